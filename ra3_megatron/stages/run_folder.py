"""The folder of a run: its configuration, its numbered stages, their DONE markers.

```
<run>/config.yaml                 resolved configuration; compared on resume
<run>/<nn>-<stage>/...            one folder per stage, DONE written last
<run>/<nn>-<stage>/logs/<attempt> environment of each attempt, with a `latest` link
<run>/report.html
```
"""

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import is_done, write_done
from ra3_megatron.config.run import RunConfig, config_differences, load_config
from ra3_megatron.report.environment import write_environment

FREE_TO_CHANGE = (
    "run.dir",
    "parallel.",
    "train.micro_batch_size",
    "model.layers",
    "model.recompute",
    "model.offload_layers",
    "model.fp8_health",
    "model.fp8_probe",
    "data.workers",
    "checkpoint.",
    "report.",
    "judge.workers",
    "judge.addresses",
    "judge.secret_file",
    "judge.max_pending",
    "judge.jobs_per_sandbox",
    "evaluation.",
)
"""Fields that may differ between resumes: they change neither the data order nor, beyond rounding, the result; those of
`evaluation` change the last stage alone, which sees to it itself."""

LOCK_PATIENCE_S = 10.0
"""How long a job waits for the one before it to be gone, seconds."""


@dataclass(frozen=True)
class StageFolder:
    """One stage's folder."""

    path: Path
    """`<run>/<nn>-<stage>`."""

    @property
    def done(self) -> bool:
        """Whether the stage has finished."""
        return is_done(self.path)

    def result(self) -> dict[str, Any]:
        """What the stage left for the next one: the content of its DONE marker. Raises UserError when damaged."""
        try:
            return json.loads((self.path / "DONE").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path}/DONE is damaged ({error}); delete it and run again") from None

    def finish(self, result: dict[str, Any]) -> None:
        """Write the DONE marker with the stage's result; call it last, on one rank."""
        write_done(self.path, json.dumps(result, indent=1, sort_keys=True))


@dataclass(frozen=True)
class RunFolder:
    """A run's folder."""

    path: Path
    """`run.dir`."""

    def stage(self, number: int, name: str) -> StageFolder:
        """Folder of stage `name`, the `number`-th of its run."""
        return StageFolder(self.path / f"{number:02d}-{name}")

    def claim(self, config: RunConfig, accept_changes: bool) -> None:
        """Write the resolved configuration, or compare it with the one that is there; on one rank.

        Raises UserError, with the differences, for a configuration that would mix two runs.
        """
        saved = self.path / "config.yaml"
        try:
            if not saved.exists() or not self._begun():
                # A first try that failed before anything was made binds nobody: its cure is no change.
                config.save(saved)
                return
        except OSError as error:
            raise self._unwritable(error) from None
        differences = config_differences(load_config(saved), config)
        refused = [d for d in differences if not d.startswith(FREE_TO_CHANGE)]
        if refused and not accept_changes:
            raise UserError(
                f"{self.path} was started with another configuration ({'; '.join(refused)}); "
                "set run.dir to a new folder, undo the change, or pass --accept-changes to go on with it"
            )
        if differences:
            if refused:
                os.replace(saved, saved.with_name(f"config.{int(time.time())}.yaml"))
            config.save(saved)

    @contextmanager
    def locked(self, only: str = "") -> Iterator[None]:
        """Keep a second job out of the folder while the block runs; on one rank.

        With `only`, the name of a piece of work, other pieces may go on beside it: jobs of a chain that do not need one
        another. The lock dies with the process, so a killed run leaves none behind. Raises UserError naming who holds
        it.
        """
        wanted = [(".lock", fcntl.LOCK_SH), (f".lock-{only}", fcntl.LOCK_EX)] if only else [(".lock", fcntl.LOCK_EX)]
        with ExitStack() as held:
            for name, kind in wanted:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    file = held.enter_context(open(self.path / name, "a+", encoding="utf-8"))
                except OSError as error:
                    raise self._unwritable(error) from None
                if self._lock(file, kind) and kind == fcntl.LOCK_EX:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
            yield

    def _lock(self, file: TextIO, kind: int) -> bool:
        """Whether the lock could be taken; False on file systems that have none."""
        end = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                # A job that was just killed may take a moment to die.
                if time.monotonic() > end:
                    file.seek(0)
                    holder = file.read() or "another process"
                    raise UserError(
                        f"{self.path} is in use by {holder}; wait for it, stop it, or set run.dir"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                logging.getLogger(__name__).warning(
                    "%s cannot be locked (%s): take care that no second job works in it", self.path, error.strerror
                )
                return False

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"run.dir {self.path} cannot be written ({error.strerror}); set run.dir to a folder that can")

    def _begun(self) -> bool:
        """Whether a stage has finished or a checkpoint was written."""
        made = [*self.path.glob("*/DONE"), *self.path.glob("*/checkpoints/*")]
        return bool(made)


def new_attempt(stage: StageFolder) -> Path:
    """Make `logs/<attempt>` with an account of the environment and point `logs/latest` to it; on one rank."""
    logs = stage.path / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    attempt = _next_attempt(logs)
    write_environment(attempt)
    latest = logs / "latest"
    if latest.is_dir() and not latest.is_symlink():
        # A run folder copied without its links: the copy is kept under another name.
        os.replace(latest, logs / f"copied-{attempt.name}")
    link = logs / f".latest.{attempt.name}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(attempt.name)
    os.replace(link, latest)
    return attempt


def _next_attempt(logs: Path) -> Path:
    """A new numbered folder; jobs of an array may ask at the same moment."""
    while True:
        taken = [int(p.name) for p in logs.iterdir() if p.name.isdigit()]
        attempt = logs / f"{max(taken, default=0) + 1:04d}"
        try:
            attempt.mkdir()
        except FileExistsError:
            continue
        return attempt
