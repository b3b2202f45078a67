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


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "attention": {"recompute": "selective"},
    "mlp": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "moe": {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]},
    "full": {"recompute": "full"},
    "two layers": {"recompute": "full", "recompute_layers": 2},
}
"""Fields of `model`."""


def _config(recompute: str, precision: str) -> RunConfig:
    return config_from_dict(
        {
            "run": {"arms": ["ntp"]},
            "model": {"precision": precision, "layers": "local", **RECOMPUTE[recompute]},
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


MODELS = [("qwen2", "fp32"), ("qwen3", "fp32"), ("llama", "bf16"), *MIXTURES]
CASES = [(*m, r) for m in MODELS for r in RECOMPUTE if r != ("mlp" if m in MIXTURES else "moe")]


@pytest.mark.parametrize(("family", "precision", "recompute"), CASES)
def test_activations_are_those_that_autograd_saves(parallel, family, precision, recompute):
    """The estimate was half of what the layers kept, counted logits three times and knew no recomputed layer."""
    biased, normed, experts = family == "qwen2", family.startswith("qwen3"), EXPERTS if family == "qwen3_moe" else {}
    a = Architecture(family, 3, 96, 6, 2, 24, 320, 1000, False, biased, normed, max_positions=2048, **experts)
    config = _config(recompute, precision)
    layout = resolve_layout(config, 1, a)
    cpu = estimate.Kernels(te=False, gpu=False)
    memory = estimate.estimate_memory(config, a, layout, cpu)
    # Of the logits autograd saves the probabilities, in fp32; the rest of the term lives beside it.
    around = estimate._logits_bytes(config, a, layout, TOKENS, cpu)
    head = memory.logits - around + 4 * TOKENS * layout.padded_vocab
    expected = memory.activations + max(head, memory.recomputed)
    assert expected == pytest.approx(_measured(config, a, parallel), rel=0.05)


def test_fp8_has_copies_of_its_layers_matrices_and_keeps_bytes() -> None:
    """FP8 was reckoned like BF16: its copies of the weights were forgotten, its one-byte activations counted double."""
    a = Architecture("llama", 4, 64, 4, 2, 16, 128, 512, True, False, max_positions=2048)
    layer = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128

    def memory(**model: Any) -> estimate.MemoryEstimate:
        config = config_from_dict({**_PLAIN, "model": {"vocab_multiple": 1, **model}})
        return estimate.estimate_memory(config, a, resolve_layout(config, 1, a))

    bf16, fp8 = memory(precision="bf16"), memory(precision="fp8")
    assert bf16.weights == 2 * a.parameter_count
    assert fp8.weights - bf16.weights == 2 * 4 * layer
    assert memory(precision="fp8", fp8_params=True).weights == bf16.weights
    half = memory(precision="fp8", bf16_layers_at_start=1, bf16_layers_at_end=1)
    assert half.weights - bf16.weights == 2 * 2 * layer
    # Per token and layer, inputs of matrix products: two normed streams and the product of the MLP shrink by a byte a
    # number; the attention's output stays for its own backward pass, and gets an FP8 copy.
    assert bf16.activations - fp8.activations == TOKENS * 4 * (64 + 64 + 128 - 64)
    assert half.activations == (bf16.activations + fp8.activations) // 2
    assert memory(precision="bf16", offload_layers=3).activations == bf16.activations // 4


_PLAIN: dict[str, Any] = {
    "run": {"arms": ["ntp"]}, "train": {"steps": 10, "seq_length": TOKENS, "global_batch_size": 1},
}  # fmt: skip
