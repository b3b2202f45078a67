"""Settings of the judge: where programs are run, how strictly they are kept in."""

from dataclasses import dataclass

from ra3_megatron.config.data import _at_least


@dataclass(frozen=True)
class JudgeConfig:
    """Where and within which limits programs are judged."""

    workers: int | None = None
    """Programs judged at once by this machine; none = its cores, less those that train, at least 1."""
    cpu_s: float = 4.0
    """Processor seconds of one test."""
    memory_mb: int = 2048
    """Address space of a program, MiB."""

    def __post_init__(self) -> None:
        _at_least("judge.workers", self.workers, 1)
        _at_least("judge.cpu_s", self.cpu_s, 0.1)
        _at_least("judge.memory_mb", self.memory_mb, 64)
