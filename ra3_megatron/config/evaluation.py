"""Settings of the evaluation on benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationConfig:
    """Benchmarks that the base model and the arms are measured on at the end of a run."""

    benchmarks: tuple[str, ...] = ()
    """Such as humaneval, humaneval+, mbpp, mbpp+, livecodebench, codeforces; empty = no such stage."""
