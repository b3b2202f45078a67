"""Settings of the judge: where programs are run, how strictly they are kept in."""

from dataclasses import dataclass
from typing import Literal

from ra3_megatron.config.data import _at_least, _one_of
from ra3_megatron.config.errors import UserError

BACKENDS = ("local", "service", "sandbox_fusion")
LEVELS = ("limits", "syscalls", "files", "namespaces")
"""From weak to strong; `ra3_megatron.reward.sandbox.level` says what each means."""
NAMESPACES = ("auto", "bubblewrap", "own", "none")


@dataclass(frozen=True)
class JudgeConfig:
    """Where and within which limits programs are judged."""

    backend: Literal["local", "service", "sandbox_fusion"] = "local"
    """`local` (a pool of sandboxes on this machine), `service` (`ra3 judge serve` on other machines) or
    `sandbox_fusion` (SandboxFusion's HTTP interface)."""
    workers: int | None = None
    """Programs judged at once by this machine; none = its cores, less those that train, at least 1."""
    cpu_s: float = 4.0
    """Processor seconds of one test."""
    memory_mb: int = 2048
    """Address space of a program, MiB."""
    minimum_level: Literal["limits", "syscalls", "files", "namespaces"] = "files"
    """Weakest isolation that training accepts: `limits` (resource limits), `syscalls` (and a system call filter: no
    network, no other processes), `files` (and no files but Python's library), `namespaces` (and own process, network
    and mount namespaces)."""
    namespaces: Literal["auto", "bubblewrap", "own", "none"] = "auto"
    """Who makes the namespaces: `bubblewrap` (must be installed), `own` (system calls of this package), `auto`
    (bubblewrap when it works, else own when it works, else none) or `none`."""
    uid: int = 61000
    """As root: programs run under this user id plus the worker's number; ids that own nothing on this machine."""
    retries: int = 2
    """Further attempts on a fresh sandbox after the infrastructure failed; after them the sample is lost."""
    max_pending: int = 512
    """Submissions that may wait; `submit` blocks while there are as many, so that a producer cannot run ahead."""
    jobs_per_sandbox: int = 1000
    """Submissions after which a sandbox's processes are replaced by fresh ones."""
    preload_numpy: bool = False
    """Import numpy into the sandbox once, for programs that need it; without it no program can import numpy."""
    addresses: tuple[str, ...] = ()
    """`service`, `sandbox_fusion`: base addresses such as http://node7:8099, used in turn."""
    secret_file: str | None = None
    """`service`: file with the secret that clients and servers share; only its owner may read it."""

    def __post_init__(self) -> None:
        _one_of("judge.backend", self.backend, BACKENDS)
        _one_of("judge.minimum_level", self.minimum_level, LEVELS)
        _one_of("judge.namespaces", self.namespaces, NAMESPACES)
        _at_least("judge.workers", self.workers, 1)
        _at_least("judge.cpu_s", self.cpu_s, 0.1)
        _at_least("judge.memory_mb", self.memory_mb, 64)
        _at_least("judge.uid", self.uid, 1)
        _at_least("judge.retries", self.retries, 0)
        _at_least("judge.max_pending", self.max_pending, 1)
        _at_least("judge.jobs_per_sandbox", self.jobs_per_sandbox, 1)
        if self.backend != "local" and not self.addresses:
            raise UserError(
                f"judge.backend = {self.backend}; judge.addresses is empty; list the base addresses to send programs to"
            )
