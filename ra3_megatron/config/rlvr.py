"""Settings of RLVR: reinforcement learning with programs judged by tests."""

from dataclasses import dataclass

from ra3_megatron.config.data import _at_least


@dataclass(frozen=True)
class RlvrConfig:
    """Reinforcement learning with verifiable rewards, after mid-training; GRPO as in DeepCoder."""

    steps: int = 0
    """Optimizer steps; 0 = no such stage."""

    def __post_init__(self) -> None:
        _at_least("rlvr.steps", self.steps, 0)
