"""Expert parallelism: which sizes fit the processes, the model and the stages of a run."""

from typing import Protocol

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import THINKING_ARMS
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.sections import ParallelConfig


class ExpertSizes(Protocol):
    """Parallel sizes that concern a mixture of experts, from a configuration or in force."""

    @property
    def tensor(self) -> int: ...
    @property
    def sequence(self) -> bool: ...
    @property
    def expert(self) -> int: ...
    @property
    def expert_tensor(self) -> int | None: ...


def expert_replicas(p: ParallelConfig, data: int) -> int:
    """How many processes hold the same experts; raises UserError with the arithmetic when the sizes do not fit.

    Experts are spread over all processes of a pipeline stage, whatever these do for the rest of a layer.
    """
    tensor = p.expert_tensor or p.tensor
    if min(p.expert, tensor) < 1 or p.tensor % tensor:
        raise UserError(
            f"parallel.expert is {p.expert} and expert_tensor {tensor} with tensor {p.tensor}; both must be at least 1 "
            "and expert_tensor a divisor of tensor"
        )
    stage = p.tensor * p.context * data
    if stage % (tensor * p.expert):
        fitting = max(d for d in range(1, p.expert) if stage % (tensor * d) == 0)
        raise UserError(
            f"parallel.expert_tensor {tensor} x expert {p.expert} = {tensor * p.expert} does not divide the {stage} "
            f"processes of a pipeline stage (tensor {p.tensor} x context {p.context} x data {data}); the next size of "
            f"parallel.expert that does is {fitting}"
        )
    return stage // (tensor * p.expert)


def check_expert_split(p: ExpertSizes, a: Architecture) -> None:
    """Raise UserError unless the experts of `a`, if it has any, divide over the processes that share them."""
    tensor = p.expert_tensor or p.tensor
    if not a.num_experts:
        if p.expert > 1 or tensor != p.tensor:
            raise UserError(
                f"parallel.expert is {p.expert} and expert_tensor {tensor}, but the model ({a.family}) has no experts; "
                "leave both out"
            )
        return
    if p.tensor > 1 and not p.sequence:
        raise UserError(
            f"the model has {a.num_experts} experts and parallel.tensor is {p.tensor} with sequence false; every "
            "process would route all tokens; set parallel.sequence=true"
        )
    for what, value, by, size in (
        ("num_experts", a.num_experts, "expert", p.expert),
        ("expert_ffn_hidden_size", a.expert_ffn_hidden_size, "expert_tensor", tensor),
    ):
        if value % size:
            fitting = max(d for d in range(1, size) if value % d == 0)
            raise UserError(
                f"parallel.{by} ({size}) does not divide model.architecture.{what} ({value}); the next size that does "
                f"is {fitting}"
            )


def within_replica(p: ExpertSizes) -> bool:
    """Whether processes that share experts belong to one replica, without context parallelism."""
    return p.tensor % ((p.expert_tensor or p.tensor) * p.expert) == 0


def check_expert_rollouts(config: RunConfig) -> None:
    """Raise UserError where the run samples and its replicas share experts."""
    arms = config.run.arms
    sampling = {
        "run.arms": len(arms) > 1 or any(arm in THINKING_ARMS for arm in arms),
        "rlvr.steps": bool(config.rlvr.steps),
        "evaluation.benchmarks": bool(config.evaluation.benchmarks),
    }
    names = [name for name, samples in sampling.items() if samples]
    if names:
        refuse_shared_sampling(config.parallel, ", ".join(names))


def refuse_shared_sampling(p: ExpertSizes, who: str) -> None:
    """Raise UserError where replicas that sample at their own pace would have to exchange tokens; `who` samples."""
    if not within_replica(p):
        tensor = p.expert_tensor or p.tensor
        raise UserError(
            f"parallel.expert_tensor {tensor} x expert {p.expert} reaches over replicas of tensor {p.tensor}, and "
            f"{who} samples: replicas sample at their own pace and would wait for one another for ever; choose an "
            f"expert_tensor x expert that divides {p.tensor}, such as parallel.expert={p.tensor} "
            "parallel.expert_tensor=1"
        )
