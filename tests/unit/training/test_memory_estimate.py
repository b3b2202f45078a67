"""The memory estimate against what autograd really saves in a training step of the engine."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.config import estimate
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import Parallel, seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine

LENGTHS = (60, 4, 96, 96)
TOKENS = sum(LENGTHS)


class Saved:
    """Bytes of the storages that autograd keeps alive, each once, those of `own` left out; the most at any moment."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.now, self.peak = own, 0, 0
        self.holders: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> "_Held":
        return _Held(self, tensor)


class _Held:
    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage.data_ptr(), storage.nbytes()
        if self.key not in saved.own:
            if self.key not in saved.holders:
                saved.now += self.bytes
                saved.peak = max(saved.peak, saved.now)
            saved.holders[self.key] = saved.holders.get(self.key, 0) + 1

    def __del__(self) -> None:
        if self.key not in self.saved.own:
            self.saved.holders[self.key] -= 1
            if not self.saved.holders[self.key]:
                del self.saved.holders[self.key]
                self.saved.now -= self.bytes


def _config(recompute: str, precision: str) -> RunConfig:
    return config_from_dict(
        {
            "run": {"arms": ["ntp"]},
            "model": {"precision": precision, "recompute": recompute, "layers": "local"},
            "train": {"steps": 10, "seq_length": TOKENS, "global_batch_size": 1},
        }
    )


def _batch(vocab: int) -> TrainBatch:
    ids = torch.randint(vocab, (TOKENS,), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return TrainBatch(
        input_ids=ids,
        labels=ids.roll(-1),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS]),
        cu_seqlens=ends.int(),
        max_seqlen=max(LENGTHS),
        weights={"cross_entropy": torch.ones(TOKENS)},
    )


def _measured(config: RunConfig, architecture: Architecture, parallel: Parallel) -> int:
    """Most bytes that autograd holds at once."""
    seed_everything(0, parallel)
    chunks = build_model(architecture, config.model, parallel)
    engine = TrainEngine(config, architecture, parallel, chunks, [cross_entropy_component()], 10)
    model: Any = unwrap(chunks[0])
    saved = Saved({t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        engine.train_step([_batch(architecture.vocab_size)], 1)
    return saved.peak


MIXTURES = [("qwen3_moe", "fp32"), ("qwen3_moe", "bf16")]
EXPERTS: dict[str, Any] = {
    "num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 160, "norm_topk_prob": True,
}  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("family", "precision"), [("qwen2", "fp32"), ("qwen3", "fp32"), ("llama", "bf16"), *MIXTURES])
def test_activations_are_those_that_autograd_saves(parallel, recompute, family, precision):
    """The estimate was half of what the layers kept, counted logits three times and knew no recomputed layer."""
    biased, normed, experts = family == "qwen2", family.startswith("qwen3"), EXPERTS if family == "qwen3_moe" else {}
    a = Architecture(family, 3, 96, 6, 2, 24, 320, 1000, False, biased, normed, max_positions=2048, **experts)
    config = _config(recompute, precision)
    layout = resolve_layout(config, 1, a)
    memory = estimate.estimate_memory(config, a, layout, estimate.Kernels(te=False, fused_norms=False))
    # Of the logits autograd saves the probabilities, in fp32; the rest of the term lives beside it.
    around = estimate._logits_bytes(config, a, layout, TOKENS)
    head = memory.logits - around + 4 * TOKENS * layout.padded_vocab
    expected = memory.activations + max(head, memory.recomputed)
    assert expected == pytest.approx(_measured(config, a, parallel), rel=0.05)
