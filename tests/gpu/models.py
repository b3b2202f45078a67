"""Models, engines and batches that the tests of this folder share."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from ra3_megatron.checkpoint.fp8_state import put_back
from ra3_megatron.config.architecture import Architecture, RopeScaling
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.attention import packed_params
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import Parallel, seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine

FAMILIES = {
    "qwen2": Architecture("qwen2", 2, 1024, 16, 4, 64, 2816, 16000, True, True, max_positions=4096),
    "qwen3": Architecture("qwen3", 2, 1024, 8, 4, 128, 3072, 16000, False, False, True, max_positions=4096),
    "llama": Architecture(
        "llama", 2, 1024, 16, 8, 64, 2816, 16000, False, False, False, 500000.0, RopeScaling(8.0), max_positions=4096
    ),
}
"""Real widths in two layers: through more, the roundings of BF16 alone add up to a per cent."""

SMALL = Architecture("qwen3", 4, 256, 4, 2, 64, 768, 1024, False, False, True, max_positions=1024)
"""Learns in 200 steps of a few milliseconds."""
SEQ = 512


def settings(**model: Any) -> ModelConfig:
    return ModelConfig(**{"precision": "bf16", "fp8_probe_interval": 0, "fp8_health_interval": 0, **model})


def build(arch: Architecture, parallel: Parallel, seed: int = 5, **model: Any) -> list[torch.nn.Module]:
    seed_everything(seed, parallel)
    return build_model(arch, settings(**model), parallel)


def same_weights(source: torch.nn.Module, target: torch.nn.Module) -> torch.nn.Module:
    """`target` with the parameters of `source`, whatever the layers of either."""
    weights = {k: v for k, v in unwrap(source).state_dict().items() if "_extra_state" not in k}
    put_back(target, weights)
    return target


def config(steps: int = 200, lr: float = 2e-3, **model: Any) -> RunConfig:
    return config_from_dict(
        {
            "train": {"steps": steps, "seq_length": SEQ, "micro_batch_size": 4, "global_batch_size": 8},
            "model": vars(settings(**model)) | {"architecture": None},
            "optimizer": {"lr": lr, "warmup_steps": 10},
        }
    )


def engine(parallel: Parallel, arch: Architecture = SMALL, steps: int = 200, **model: Any) -> TrainEngine:
    """From the same initial weights whatever the layers and the precision."""
    c = config(steps, **model)
    [start] = build(arch, parallel, layers="local", precision="fp32")
    chunks = build(arch, parallel, **model)
    same_weights(start, chunks[0])
    return TrainEngine(c, arch, parallel, chunks, [cross_entropy_component()], steps)


@cache
def batch(seed: int, vocab: int = SMALL.vocab_size, windows: int = 4) -> TrainBatch:
    """Packed windows of a language with an entropy of about 4 nats: half of the tokens follow from the one before."""
    g = torch.Generator().manual_seed(seed)
    follower = torch.randperm(vocab, generator=torch.Generator().manual_seed(0)).tolist()
    total = windows * SEQ
    ids = torch.randint(vocab, (total,), generator=g).tolist()
    follows = (torch.rand(total, generator=g) < 0.5).tolist()
    for i in range(1, total):
        if follows[i]:
            ids[i] = follower[ids[i - 1]]
    boundaries = [0]
    for start in range(0, total, SEQ):
        # Multiples of 16: context parallelism shares every sequence out.
        cuts = (torch.randint(1, SEQ // 16, (2,), generator=g).sort().values * 16).tolist()
        boundaries += [start + c for c in dict.fromkeys(cuts)] + [start + SEQ]
    lengths = [b - a for a, b in pairwise(boundaries)]
    weight = torch.ones(total)
    weight[[b - 1 for b in boundaries[1:]]] = 0.0
    tokens = torch.tensor(ids)
    return TrainBatch(
        input_ids=tokens,
        labels=tokens.roll(-1),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=max(lengths),
        weights={"cross_entropy": weight},
    )


def losses(e: TrainEngine, steps: int, first: int = 1) -> list[float]:
    return [e.train_step([batch(2 * s), batch(2 * s + 1)], s).loss for s in range(first, first + steps)]


def packed_logits(chunk: torch.nn.Module, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Logits [tokens, vocabulary] in fp32 of a packed window, without gradients."""
    device = ids.device
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)[None]
    with torch.no_grad():
        out = chunk(ids[None], positions, None, packed_seq_params=packed_params(lengths, device))
    return out[0].float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a - b).norm() / b.norm())


def with_probe(c: RunConfig, **model: Any) -> RunConfig:
    return replace(c, model=replace(c.model, **model))
