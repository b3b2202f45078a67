"""Small runs on the virtual cluster: made, started, watched, compared with the same run on this machine."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ra3_megatron.launch.attempts import RECORD, STARTUP, Record
from tests.e2e import rl, small
from tests.slurm.cluster import ROOT, Cluster

LIGHT_WORKER = ROOT / "tests" / "slurm" / "light_worker"
QUICK = {"RA3_HANG_POLL_S": "0.2", "PYTHONDONTWRITEBYTECODE": "1"}
PREPARE = "00-prepare"
STAGE = "01-ntp"
STEPS = 24

RLVR = "01-rlvr"
RLVR_ALONE = {
    "steps": 16, "max_lag": 1, "prompts_per_step": 4, "group_size": 4, "max_tokens": 24, "max_refills": 1,
    "overlong": "keep", "validation_tasks": 4, "eval_interval": 6, "checkpoint_interval": 4, "lr": 3e-3,
}  # fmt: skip
"""Answers to `tests.e2e.rl`'s tasks; a checkpoint every fourth step."""


def settings(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Next-token prediction that saves every fourth step."""
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": STEPS, "eval_interval": 0, "eval_windows": 8},
        "checkpoint": {"interval": 4},
        "report": {"interval": 20},
        "export": {"enabled": False},
        "parallel": {"timeout_s": 120.0},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    return small.config(folder, **sections)


@dataclass
class Run:
    """One run's folder and how its jobs are started."""

    cluster: Cluster
    folder: Path
    """With config.yaml and run/."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of whoever submits."""

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def stage(self, name: str = STAGE) -> Path:
        return self.run / name

    def ra3(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`ra3 ARGUMENTS` on the login node."""
        return self.cluster.run([sys.executable, "-m", "ra3_megatron", *arguments], env=self.env, **options)

    def launch(self, *options: str, target: Path | None = None) -> dict[str, str]:
        """`ra3 launch` on two nodes, unless `options` say otherwise; returns the number of every job submitted."""
        shape = ["--nodes", "2", "--processes-per-node", "1", "--grace-s", "60", "--time", "10"]
        done = self.ra3("launch", str(target or self.config), *shape, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(re.findall(r"^(\S+): submitted (\S+)", done.stdout, re.MULTILINE))

    def step(self, stage: str = STAGE) -> int:
        """Step of the newest metrics record."""
        path = self.stage(stage) / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        return json.loads(whole[-1])["step"] if whole else 0

    def wait_for_step(self, step: int, seconds: float = 240, stage: str = STAGE) -> None:
        """Until `step` steps are done."""
        self.cluster.wait(lambda: self.step(stage) >= step, seconds, f"step {step}; {self.logs()}")

    def done(self, stage: str = STAGE) -> bool:
        return (self.stage(stage) / "DONE").is_file()

    def result(self, stage: str = STAGE) -> dict[str, Any]:
        """What the stage left, the clock's share taken off."""
        result = json.loads((self.stage(stage) / "DONE").read_text())
        return {k: v for k, v in result.items() if k not in ("seconds", "tokens_per_second")}

    def evaluated(self, stage: str) -> dict[str, Any]:
        """What was measured of every model on the benchmarks, without places and the clock's share."""
        found = json.loads((self.stage(stage) / "results.json").read_text())
        for model in found["models"].values():
            model.pop("checkpoint")
            for figures in model["benchmarks"].values():
                figures.pop("judge_cpu_s")
        return found

    def events(self, job: str = STAGE) -> list[str]:
        """Names of the events in the job's record."""
        return [e["event"] for e in Record(self.run / "jobs" / job).events() if e["event"] != STARTUP]

    def has_record(self, job: str = STAGE) -> bool:
        return (self.run / "jobs" / job / RECORD).exists()

    def logs(self) -> str:
        """The ends of all logs, for a test that failed."""
        paths = [*self.run.glob("jobs/**/slurm-*.log"), *self.run.glob("jobs/**/node*.log")]
        return "\n".join(f"== {p.relative_to(self.run)}\n{p.read_text(errors='replace')[-1500:]}" for p in paths)

    def wait_for_end(self, job: str, states: str = "COMPLETED", seconds: float = 400) -> None:
        """Until the job has ended in a state; shows the logs when it is another."""
        try:
            self.cluster.wait_for_state(job, states, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def rank_process(self, rank: int, attempt: str = "latest", job: str = STAGE) -> tuple[str, int]:
        """Node of a rank, and its process number as the machine sees it."""
        path = self.run / "jobs" / job / attempt / "ranks" / str(rank)
        self.cluster.wait(path.exists, 240, f"rank {rank} signs in; {self.logs()}")
        node, number = path.read_text().split()
        space = os.readlink(f"/proc/{(self.cluster.folder / 'run' / f'{node}.init').read_text().strip()}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns" / "pid") != space:
                    continue
                numbers = re.search(r"^NSpid:\t(.*)$", (folder / "status").read_text(), re.MULTILINE)
            except OSError:
                continue
            if numbers and numbers[1].split()[-1] == number:
                return node, int(folder.name)
        raise AssertionError(f"no process {number} on {node}")


class Runs:
    """Makes runs whose corpus is prepared, and knows what they must end with."""

    def __init__(self, cluster: Cluster, zygote: Callable[[], Path], folder: Path) -> None:
        self.cluster, self._zygote, self._folder = cluster, zygote, folder
        self._rank_python = cluster.bin / "rank-python"
        text = (ROOT / "tests" / "slurm" / "rank_python.py").read_text()
        self._rank_python.write_text(f"#!{sys.executable} -SE\n{text}")
        self._rank_python.chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        """Ranks come out of the zygote."""
        return {**QUICK, "RA3_PYTHON": str(self._rank_python), "RA3_TEST_ZYGOTE": str(self._zygote())}

    def hollow(self, folder: Path, *done: str, **changes: dict[str, Any]) -> Run:
        """A run whose processes only wait for one another and mark their stage as done; `done` are stages that are."""
        run = self._written(folder, {**QUICK, "RA3_PYTHON": str(LIGHT_WORKER)}, **changes)
        for name in done:
            run.stage(name).mkdir(parents=True)
            (run.stage(name) / "DONE").write_text("{}")
        return run

    def fresh(self, folder: Path, **changes: dict[str, Any]) -> Run:
        """A run of which nothing is done yet."""
        return self._written(folder, self.env, **changes)

    def _written(self, folder: Path, env: dict[str, str], **changes: dict[str, Any]) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder, **changes)))
        return Run(self.cluster, folder, env)

    def prepared(self, folder: Path, **changes: dict[str, Any]) -> Run:
        """A run whose corpus is there."""
        source = self._prepared
        run = self.fresh(folder, **changes)
        config = yaml.safe_load(run.config.read_text())
        config["data"]["corpus"]["path"] = str(source.folder / "code")
        run.config.write_text(yaml.safe_dump(config))
        shutil.copytree(source.run / "00-prepare", run.run / "00-prepare", symlinks=True)
        return run

    @cached_property
    def _prepared(self) -> Run:
        run = self.fresh(self._folder / "prepare")
        self.local(run, ["midtrain", str(run.config), "--stage", "prepare"], world=1)
        return run

    def rlvr(self, folder: Path, generating: int = 0, **changes: Any) -> Run:
        """RLVR alone, from a model trained before, with `generating` replicas that train nothing."""
        tasks = rl.write_tasks(self._folder / "tasks.jsonl")
        rlvr = {**RLVR_ALONE, "start": str(self._trained.run), "tasks": str(tasks), **changes}
        run = self.fresh(folder, rlvr=rlvr, latent={"max_batch": 16}, judge={"workers": 1})
        config = yaml.safe_load(run.config.read_text())
        config["parallel"] = {**config.get("parallel", {}), "generation_replicas": generating}
        config["run"]["arms"] = []
        config["model"].pop("architecture")
        run.config.write_text(yaml.safe_dump(config))
        return run

    @cached_property
    def _trained(self) -> Run:
        """Three steps of next-token prediction: something to start from."""
        run = self.prepared(self._folder / "trained", train={"steps": 3})
        self.local(run, ["midtrain", str(run.config), "--stage", "ntp"], world=1)
        return run

    @cached_property
    def rlvr_reference(self) -> dict[str, Any]:
        """What `RLVR` ends with on two processes of this machine that nobody disturbs."""
        run = self.rlvr(self._folder / "rlvr-reference")
        self.local(run, ["rlvr", str(run.config)], world=2)
        return run.result(RLVR)

    @cached_property
    def reference(self) -> dict[str, Any]:
        """What `STAGE` ends with when two processes of this machine do it without a break."""
        run = self.prepared(self._folder / "reference")
        self.local(run, ["midtrain", str(run.config), "--stage", "ntp"], world=2)
        return run.result()

    def local(self, run: Run, arguments: list[str], world: int) -> None:
        """`ra3 ARGUMENTS` as `world` processes of this machine, outside of the cluster."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {k: v for k, v in self.cluster.env.items() if not k.startswith("VC_")} | self.env
        started = []
        for rank in range(world):
            place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                     "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                     "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
            with open(run.folder / f"local{rank}.log", "wb") as log:
                started.append(
                    subprocess.Popen(
                        [str(self._rank_python), "-m", "ra3_megatron", *arguments],
                        env={**env, **place},
                        cwd=ROOT,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                    )
                )
        end = time.monotonic() + 600
        for rank, process in enumerate(started):
            code = process.wait(max(1.0, end - time.monotonic()))
            assert code == 0, (run.folder / f"local{rank}.log").read_text()[-3000:]
