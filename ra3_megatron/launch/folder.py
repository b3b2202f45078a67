"""What a launch leaves in the run's folder: configuration, settings, a snapshot of the code.

```
<run>/launch/config.yaml      what every job of the run reads
<run>/launch/settings.json    shape of the jobs
<run>/launch/code/            the package and the scripts as they were, and the commit they come from
<run>/jobs/<job>/             Slurm's log, attempts.jsonl, a folder per attempt with a `latest` link
```
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ra3_megatron
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_dir, atomic_write_text
from ra3_megatron.config.run import RunConfig, config_differences, load_config
from ra3_megatron.stages.run_folder import FREE_TO_CHANGE

JOBS = "jobs"
"""Folder of the jobs in the run's folder."""

PROJECT = "RA3_PROJECT"
"""Variable: folder of the code a job runs, with `slurm/` and `ra3_megatron/` in it."""

PATIENCE_S = 10.0
"""How long a launch waits for another of the same run, seconds."""


def project_folder() -> Path:
    """The checkout or snapshot this code runs from. Raises UserError when the scripts are not beside it."""
    folder = Path(ra3_megatron.__file__).parents[1]
    if not (folder / "slurm" / "midtrain.sh").is_file():
        raise UserError(f"no slurm/ beside {folder / 'ra3_megatron'}; launch from a checkout (pip install -e .)")
    return folder


@dataclass(frozen=True)
class LaunchFolder:
    """The launch's part of a run's folder."""

    run: Path
    """The run's folder, absolute: jobs start elsewhere."""

    @property
    def path(self) -> Path:
        """`<run>/launch`."""
        return self.run / "launch"

    @property
    def config(self) -> Path:
        """What every job reads."""
        return self.path / "config.yaml"

    @property
    def settings(self) -> Path:
        """Shape of the jobs."""
        return self.path / "settings.json"

    @property
    def code(self) -> Path:
        """The snapshot."""
        return self.path / "code"

    def code_of_job(self, env: Mapping[str, str]) -> Path:
        """The code a job runs: where its script lies."""
        return Path(env.get(PROJECT) or project_folder())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second launch out: it would submit the same jobs. Raises UserError after `PATIENCE_S`."""
        self.path.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + PATIENCE_S
        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise UserError(
                            f"another launch of {self.run} is under way; try again when it is over"
                        ) from None
                    time.sleep(0.1)
            yield

    def refuse_other(self, config: RunConfig) -> None:
        """Raise UserError when the run was launched with another configuration."""
        if not self.config.exists():
            return
        differences = config_differences(load_config(self.config), config)
        refused = [d for d in differences if not d.startswith(FREE_TO_CHANGE)]
        if refused:
            raise UserError(
                f"{self.run} was launched with another configuration ({'; '.join(refused)}); set run.dir to a new "
                "folder, or undo the change"
            )

    def write(self, config: RunConfig) -> None:
        """The configuration, and the snapshot where there is none: a run goes on with the code it began with."""
        config.save(self.config)
        # For the snapshot's own scripts, started by hand from a shell that knows nothing of it.
        atomic_write_text(self.path / "python", sys.executable + "\n")
        if not (self.code / "COMMIT").exists():
            snapshot(project_folder(), self.code)

    def commit(self) -> str:
        """Commit of the snapshot."""
        path = self.code / "COMMIT"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def snapshot(project: Path, target: Path) -> None:
    """Copy the package and the scripts, and write where they come from, whole or not at all."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    with atomic_dir(target) as folder:
        for name in ("ra3_megatron", "slurm"):
            shutil.copytree(project / name, folder / name, ignore=ignore)
        atomic_write_text(folder / "COMMIT", (os.environ.get("RA3_CODE_COMMIT") or _commit(project)) + "\n")


def _commit(project: Path) -> str:
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or "unknown"
