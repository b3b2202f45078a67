"""`ra3 doctor`: what this machine has, what works on it and what does not, with the cure."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from ra3_megatron.config.errors import UserError
from ra3_megatron.model.optional import OptionalPackage, apex, check_apex, transformer_engine
from ra3_megatron.parallel.cpu_layer import CHECKED_VERSIONS, install
from ra3_megatron.report.environment import cpu_name, device_names
from ra3_megatron.report.figures import format_bytes
from ra3_megatron.stages.fast_paths import FastPath, Machine, fast_paths

GIB = 1 << 30
MIN_MEMORY = 4 * GIB
"""Memory the quick start wants, bytes."""
MIN_DISK = 2 * GIB
"""Free disk a small run wants in the working folder, bytes."""
MIN_SHM = GIB
"""Shared memory NCCL wants between the GPUs of a node, bytes."""
PROBE_DEADLINE_S = 180.0
"""Deadline of one collective self-test, seconds; importing torch is most of it on a busy machine."""

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    """What."""
    state: State
    """`ok`; `note`: something is missing that the laptop path does not need; `problem`: it stops the laptop path."""
    found: str
    """What was found."""
    cure: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Ability:
    """One thing a user may want to do here."""

    name: str
    """What."""
    works: bool
    """Whether it works here."""
    why: str
    """With what, or why not."""


@dataclass(frozen=True)
class Examination:
    """All that `ra3 doctor` found."""

    checks: list[Check]
    """What was looked at."""
    abilities: list[Ability]
    """What follows."""
    paths: list[FastPath] = field(default_factory=list)
    """Fast paths, on or not."""

    @property
    def healthy(self) -> bool:
        """Whether the laptop path works: training on this machine's CPU, in one process and in several."""
        return not any(check.state == "problem" for check in self.checks)


def run_doctor(console: Console | None = None) -> bool:
    """Examine this machine, print the findings, and return whether the laptop path works."""
    console = console or Console()
    with console.status("looking around, and trying collectives between two processes"):
        examination = examine()
    console.print(_check_table(examination.checks))
    console.print(_ability_table(examination.abilities))
    if examination.paths:
        console.print(_path_table(examination.paths))
    console.print("This machine can train." if examination.healthy else "Training will not work before this is cured.")
    return examination.healthy


def examine(folder: Path | None = None) -> Examination:
    """Look at everything; `folder` (default: the working folder) is where runs would be written."""
    folder = folder or Path.cwd()
    devices = device_names()
    te = transformer_engine()
    collectives = [gloo_check(), nccl_check(len(devices))]
    checks = [
        python_check(),
        torch_check(),
        megatron_check(),
        apex_check(),
        te_check(te, bool(devices)),
        flash_attention_check(),
        Check("CPU", "ok", f"{cpu_name()}, {_cores()} cores"),
        Check("GPU", "ok" if devices else "note", "; ".join(devices) or "none", "" if devices else "not needed"),
        *collectives,
        memory_check(psutil.virtual_memory().total),
        disk_check(folder, shutil.disk_usage(folder).free),
        shm_check(bool(devices)),
        compiler_check(bool(devices)),
    ]
    paths, broken = look_for_paths()
    return Examination([*checks, *broken], abilities(checks, te, devices), paths)


def look_for_paths() -> tuple[list[FastPath], list[Check]]:
    """The fast paths, or, where Transformer Engine is installed and does not load, the check that says so."""
    try:
        return fast_paths(Machine.found()), []
    except (ImportError, OSError, RuntimeError) as error:
        cure = "build it against this torch: pip install --no-build-isolation 'ra3-megatron[te]', or uninstall it"
        first = str(error).strip().splitlines()[:1]
        return [], [Check("Transformer Engine", "problem", f"does not load: {' '.join(first)}", cure)]


# ---------------------------------------------------------------------------------------------------- software


def python_check() -> Check:
    """Python's version; an older one than 3.12 cannot even install the package."""
    return Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def torch_check() -> Check:
    """torch's version and what it was built for."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check("torch", "ok", f"{torch.__version__}, built for {built}")


def megatron_check() -> Check:
    """megatron-core's version, and whether it can be made to run on this CPU."""
    version = _version("megatron-core")
    if version is None:
        return Check("megatron-core", "problem", "not installed", f"pip install megatron-core=={CHECKED_VERSIONS[-1]}")
    try:
        install()
        import megatron.core  # noqa: F401 - importing it is the check
    except (UserError, ImportError, AttributeError) as error:
        cure = f"pip install megatron-core=={CHECKED_VERSIONS[-1]}"
        return Check("megatron-core", "problem", f"{version} does not start here: {error}", cure)
    if version not in CHECKED_VERSIONS:
        return Check("megatron-core", "note", f"{version}, not checked", f"checked: {', '.join(CHECKED_VERSIONS)}")
    return Check("megatron-core", "ok", f"{version}, checked")


def apex_check() -> Check:
    """NVIDIA's apex is welcome, its namesake breaks megatron-core."""
    try:
        check_apex()
    except UserError as error:
        return Check("apex", "problem", str(error), "pip uninstall apex")
    found = apex()
    return Check(
        "apex", "ok", f"NVIDIA's {found.version or ''}".strip() if found.usable else "not installed, not needed"
    )


def te_check(te: OptionalPackage, on_gpu: bool) -> Check:
    """Transformer Engine, in the range megatron-core 0.19 fits."""
    if te.usable:
        return Check("Transformer Engine", "ok", str(te.version))
    cure = "pip install --no-build-isolation 'ra3-megatron[te]'" if on_gpu else "not needed on a CPU"
    return Check("Transformer Engine", "note", te.reason, cure)


def flash_attention_check() -> Check:
    """flash-attn serves Megatron's dynamic inference only; training uses cuDNN's or torch's attention."""
    version = _version("flash-attn")
    return Check("flash-attn", "ok" if version else "note", version or "not installed", "" if version else "not needed")


# ---------------------------------------------------------------------------------------------------- collectives


def gloo_check() -> Check:
    """An all-reduce between two processes on this machine's CPU."""
    return _collective_check("gloo", processes=2, problem="problem")


def nccl_check(devices: int) -> Check:
    """An all-reduce over up to two GPUs; NCCL matters only where there is a GPU."""
    if not devices:
        return Check("NCCL", "note", "no GPU to try it on", "not needed on a CPU")
    return _collective_check("nccl", processes=min(devices, 2), problem="note")


def _collective_check(backend: str, processes: int, problem: State) -> Check:
    name = "NCCL" if backend == "nccl" else backend
    with tempfile.TemporaryDirectory(prefix="ra3-doctor-") as folder:
        commands = [
            [sys.executable, "-m", "ra3_megatron.stages.collective_probe", backend, str(rank), str(processes), folder]
            for rank in range(processes)
        ]
        started = time.monotonic()
        failure = run_together(commands, PROBE_DEADLINE_S)
    if failure is None:
        return Check(name, "ok", f"all-reduce over {processes} process(es) in {time.monotonic() - started:.0f} s")
    cure = (
        "see whether the host name resolves; GLOO_SOCKET_IFNAME=lo picks the loopback"
        if backend == "gloo"
        else "NCCL_DEBUG=INFO says where it stops; CUDA_VISIBLE_DEVICES='' trains on the CPU"
    )
    return Check(name, problem, failure, cure)


def run_together(commands: Sequence[Sequence[str]], deadline_s: float) -> str | None:
    """Run `commands` side by side; None if all exit with 0 within `deadline_s` seconds, else what went wrong.

    Whatever still runs at the deadline, or when one has failed, is killed and reaped.
    """
    end = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory(prefix="ra3-doctor-") as folder:
        logs = [Path(folder) / str(i) for i in range(len(commands))]
        running: list[subprocess.Popen[bytes]] = []
        try:
            for command, log in zip(commands, logs, strict=True):
                with open(log, "wb") as out:
                    running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
            while True:
                codes = [process.poll() for process in running]
                for code, log in zip(codes, logs, strict=True):
                    if code:
                        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                        return f"exit code {code}: {lines[-1] if lines else 'no output'}"
                if all(code == 0 for code in codes):
                    return None
                if time.monotonic() > end:
                    return f"no answer within {deadline_s:.0f} s"
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
                process.wait(timeout=30)


# ---------------------------------------------------------------------------------------------------- machine


def memory_check(total: int) -> Check:
    """`total` memory in bytes."""
    if total < MIN_MEMORY:
        cure = "use a smaller model and train.micro_batch_size=1"
        return Check("memory", "note", f"{format_bytes(total)}, the quick start wants {format_bytes(MIN_MEMORY)}", cure)
    return Check("memory", "ok", format_bytes(total))


def disk_check(folder: Path, free: int) -> Check:
    """`free` bytes where runs would be written; too few is a problem, since the first checkpoint would fail."""
    if not os.access(folder, os.W_OK):
        return Check("disk", "problem", f"{folder} is not writable", "change to another folder or set run.dir")
    if free < MIN_DISK:
        cure = "free some, or set run.dir to another disk"
        return Check("disk", "problem", f"{format_bytes(free)} free at {folder}, wanted {format_bytes(MIN_DISK)}", cure)
    return Check("disk", "ok", f"{format_bytes(free)} free at {folder}")


def shm_check(on_gpu: bool, folder: Path = Path("/dev/shm")) -> Check:
    """Shared memory, which NCCL moves data through on a node; containers often give 64 MB."""
    if not folder.is_dir():
        return Check("/dev/shm", "note", "does not exist", "only GPUs need it")
    total = shutil.disk_usage(folder).total
    if total < MIN_SHM:
        cure = "start the container with --shm-size=8g or --ipc=host" if on_gpu else "only GPUs need more"
        return Check("/dev/shm", "note", format_bytes(total), cure)
    return Check("/dev/shm", "ok", format_bytes(total))


def compiler_check(on_gpu: bool) -> Check:
    """A C compiler: triton's kernels and Transformer Engine's build need one on a GPU machine."""
    found = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if found:
        return Check("C compiler", "ok", found)
    return Check(
        "C compiler", "note", "none", "install gcc: triton compiles with it" if on_gpu else "not needed on a CPU"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------- what follows


def abilities(checks: Sequence[Check], te: OptionalPackage, devices: Sequence[str]) -> list[Ability]:
    """What can be done here, from what was found."""
    state = {check.name: check.state for check in checks}
    alone = [c.name for c in checks if c.state == "problem" and c.name != "gloo"]
    gloo = [c.name for c in checks if c.state == "problem"]
    nccl = bool(devices) and state["NCCL"] == "ok"
    fp8 = te.usable and any(_capability(device) >= 89 for device in devices)
    rows = [
        Ability("train on this CPU (make midtrain)", not alone, _because(alone, "torch, fp32 or bf16")),
        Ability("several processes on this CPU (torchrun)", not gloo, _because(gloo, "gloo")),
        Ability("train on a GPU in bf16", nccl, "NCCL" if nccl else "no GPU" if not devices else "NCCL failed"),
        Ability("fp8", fp8, f"Transformer Engine {te.version}" if fp8 else te.reason or "needs sm_89 or newer"),
    ]
    for extra, what, module in (
        ("wandb", "Weights & Biases", "wandb"),
        ("mlflow", "MLflow", "mlflow"),
        ("vllm", "vLLM", "vllm"),
    ):
        there = _importable(module)
        rows.append(Ability(what, there, "installed" if there else f"pip install 'ra3-megatron[{extra}]'"))
    slurm = all(shutil.which(command) for command in ("sbatch", "srun"))
    rows.append(Ability("submit Slurm jobs", slurm, "sbatch and srun found" if slurm else "no sbatch and srun on PATH"))
    return rows


def _because(problems: Sequence[str], otherwise: str) -> str:
    return f"first cure: {', '.join(problems)}" if problems else otherwise


def _capability(device: str) -> int:
    """90 of `NVIDIA H200, 140 GiB, sm_90`."""
    return int(device.rsplit("sm_", 1)[-1])


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------- tables


def _check_table(checks: Sequence[Check]) -> Table:
    marks: dict[State, str] = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    table = Table(title="this machine", title_justify="left", show_edge=False)
    for column in ("", "state", "found", "what to do"):
        table.add_column(column, overflow="fold")
    escape: Callable[[str], str] = lambda text: text.replace("[", r"\[")  # noqa: E731 - rich would read [te] as a style
    for check in checks:
        table.add_row(check.name, marks[check.state], escape(check.found), escape(check.cure))
    return table


def _ability_table(rows: Sequence[Ability]) -> Table:
    table = Table(title="\nwhat works here", title_justify="left", show_edge=False)
    for column in ("", "works", "with, or why not"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.name, "[green]yes[/]" if row.works else "[yellow]no[/]", row.why.replace("[", r"\["))
    return table


def _path_table(rows: Sequence[FastPath]) -> Table:
    marks = {"on": "[green]on[/]", "off": "[yellow]off[/]", "no GPU": "no GPU"}
    table = Table(title="\nfast paths", title_justify="left", show_edge=False)
    for column in ("", "state", "with", "without it"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.name, marks[row.state], row.found.replace("[", r"\["), row.cost.replace("[", r"\["))
    return table
