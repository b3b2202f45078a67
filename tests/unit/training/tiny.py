"""An engine on a model of a few thousand weights, and batches for it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, seed_everything
from ra3_megatron.training.actions import ActionTable
from ra3_megatron.training.components import LossComponent, Values
from ra3_megatron.training.engine import TrainEngine

SEQ, VOCAB = 16, 101


def architecture(tied: bool = True) -> Architecture:
    return Architecture("qwen2", 2, 16, 4, 2, 4, 32, VOCAB, tied, True, max_positions=64)


def config(**sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "train": {"steps": 10, "seq_length": SEQ, "global_batch_size": 2},
        "model": {"vocab_multiple": 8, "layers": "local"},
        "optimizer": {"lr": 1e-2},
        "parallel": {"timeout_s": 60.0},
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return config_from_dict(base)


def engine(
    settings: RunConfig,
    parallel: Parallel,
    components: Sequence[LossComponent],
    tied: bool = True,
    actions: ActionTable | None = None,
    label_temperature: float = 1.0,
) -> TrainEngine:
    seed_everything(3, parallel)
    chunks = build_model(architecture(tied), settings.model, parallel)
    return TrainEngine(settings, architecture(tied), parallel, chunks, components, 10, actions, label_temperature)


def batch(seed: int, component: str = "cross_entropy", **extras: Tensor) -> TrainBatch:
    """One window of `SEQ` tokens; the first and last four do not count."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.ones(SEQ)
    weight[:4] = weight[-4:] = 0.0
    return TrainBatch(
        input_ids=torch.randint(VOCAB, (SEQ,), generator=g),
        labels=torch.randint(VOCAB, (SEQ,), generator=g),
        position_ids=torch.arange(SEQ),
        cu_seqlens=torch.tensor([0, SEQ], dtype=torch.int32),
        max_seqlen=SEQ,
        weights={component: weight},
        extras=extras,
    )


def component(value: Callable[[Tensor, TrainBatch], Tensor]) -> LossComponent:
    """A component whose value is made of the labels' log-probabilities and the batch."""
    return LossComponent("cross_entropy", lambda scores, b: Values(value(scores.log_probs, b)))


def scaled() -> LossComponent:
    """Cross-entropy times `extras["scale"]`, through which a test poisons single tokens."""
    return component(lambda log_probs, b: -log_probs * b.extras["scale"])


def scale(*poisoned: int) -> Tensor:
    """Ones, with NaN at the `poisoned` positions."""
    values = torch.ones(SEQ)
    for position in poisoned:
        values[position] = torch.nan
    return values


def state(e: TrainEngine) -> dict[str, Tensor]:
    """Weights, master weights and moments, copied."""
    found = {f"{i}.{n}": p.detach().clone() for i, c in enumerate(e.chunks) for n, p in c.named_parameters()}
    for i, values in enumerate(optimizer_tensors(e)):
        found[f"optimizer.{i}"] = values.clone()
    return found


def optimizer_tensors(e: TrainEngine) -> list[Tensor]:
    """Master weights that are not the model's own, and moments: this rank's share of the optimizer."""
    inner = getattr(e.optimizer, "chained_optimizers", [e.optimizer])
    found = []
    for o in inner:
        for group in getattr(o, "shard_fp32_from_float16_groups", []):
            found += [p for p in group if p is not None]
        for values in o.optimizer.state.values():
            found += [v for k, v in values.items() if k in ("exp_avg", "exp_avg_sq")]
    return found
