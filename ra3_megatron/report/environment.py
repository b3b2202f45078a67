"""The environment dossier of an attempt: what ran where, without secrets."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from ra3_megatron import __version__
from ra3_megatron.config.control import CODE_COMMIT
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.parallel.launch import launch_from_env

ENVIRONMENT_FILE = "environment.json"

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "omegaconf",
    "vllm",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
)
"""Packages whose versions can change a run's numbers or speed."""

_VARIABLES = re.compile(
    r"^(OMP_|MKL_|KMP_|NCCL_|GLOO_|NVTE_|CUDA_|CUBLAS_|PYTORCH_|TORCH_NCCL_|RA3_)"
    r"|^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
    r"|^SLURM_(JOB_ID|JOB_NUM_NODES|JOB_NODELIST|STEP_NODELIST|ARRAY_JOB_ID|ARRAY_TASK_ID|NNODES|NTASKS|NODEID|PROCID|RESTART_COUNT)$"
    r"|^(HF_HUB_OFFLINE|TOKENIZERS_PARALLELISM|PYTHONHASHSEED)$"
)
_SECRET_NAME = re.compile(
    r"secret|passw(or)?d|api_?key|access_?key|credential|^(auth|token)$|(auth|access|bearer|hub|hf)_?token$",
    re.IGNORECASE,
)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRET_ARGUMENT = re.compile(r"([\w.-]*(?:secret|passw(?:or)?d|api_?key|access_?key|credential)[\w.-]*=)\S+", re.I)
HIDDEN = "[hidden]"


def redact(value: Any, name: str = "") -> Any:
    """`value` with every entry of a secret-sounding name, and every `user:password@` of a URL, hidden.

    Works on nested dicts and lists of plain data. The names it knows are those a configuration could hold.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if value not in (None, "") and _SECRET_NAME.search(name):
        return HIDDEN
    if isinstance(value, str):
        return _SECRET_ARGUMENT.sub(rf"\g<1>{HIDDEN}", _URL_CREDENTIALS.sub(HIDDEN, value))
    return value


def environment() -> dict[str, Any]:
    """Plain data about versions, machine, devices, git commit, command line and the variables that matter.

    Only variables from a fixed list are read, so that no token of the user's shell gets in.
    """
    return redact(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(sys.argv),
            "ra3_megatron": __version__,
            # A job runs a snapshot of the code, which is in no checkout.
            "git": os.environ.get(CODE_COMMIT) or git_state(Path(__file__).parent),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "processes": launch_from_env().world,
            "devices": device_names(),
            "driver": driver_version(),
            "packages": package_versions(),
            "variables": {k: v for k, v in sorted(os.environ.items()) if _VARIABLES.search(k)},
        }
    )


def write_environment(folder: Path | str) -> Path:
    """Write the dossier to `<folder>/environment.json` (the folder of an attempt's logs); return its path."""
    path = Path(folder) / ENVIRONMENT_FILE
    atomic_write_text(path, json.dumps(environment(), indent=1) + "\n")
    return path


def package_versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Model name of the processor, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


def device_names() -> list[str]:
    """Name and memory of every CUDA device torch sees; empty on a CPU machine."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in properties]


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """What the kernel says of NVIDIA's driver; None without one."""
    try:
        return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return None


def git_state(folder: Path) -> str | None:
    """Commit of the checkout that holds `folder`, with `-dirty` when tracked files differ; None outside of one."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None
