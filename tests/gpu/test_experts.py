"""Experts as Transformer Engine's groups on a GPU: logits, losses and FP8 against torch's, one after the other."""

import pytest
import torch

from ra3_megatron.checkpoint.capture import model_state, put_back_models
from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.model.experts import moe_layers
from ra3_megatron.model.factory import unwrap
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine
from tests.gpu.models import batch, build, config, losses, packed_logits, relative

MIXTURE = Architecture(
    "qwen3_moe", 2, 256, 4, 2, 64, 768, 1024, False, False, True, max_positions=1024,
    num_experts=16, experts_per_token=4, expert_ffn_hidden_size=256, norm_topk_prob=True,
)  # fmt: skip
LENGTHS = (100, 28, 1, 383)


def from_checkpoint(folder, parallel, **model):
    """A chunk with the weights in `folder`, whose experts may have been of another kind."""
    chunks = build(MIXTURE, parallel, seed=7, **model)
    put_back_models(chunks, load_sharded(folder, model_state(chunks, parallel), parallel))
    return chunks


@pytest.fixture
def start(parallel, tmp_path):
    """Checkpoint of torch's layers in BF16."""
    save_sharded(tmp_path / "dist", model_state(build(MIXTURE, parallel, layers="local"), parallel), parallel)
    return tmp_path / "dist"


def test_grouped_products_are_torchs(te, parallel, start):
    """The fused permutation, or gate and up, in another order than the experts' weights."""
    local, grouped = (from_checkpoint(start, parallel, layers=layers)[0] for layers in ("local", "te"))
    assert {type(moe.experts).__name__ for moe in moe_layers(unwrap(grouped))} == {"TEGroupedMLP"}
    ids = batch(1).input_ids[: sum(LENGTHS)].to(parallel.device)
    error = relative(packed_logits(grouped, ids, LENGTHS), packed_logits(local, ids, LENGTHS))
    print(f"grouped against one after the other, relative error of the logits {error:.2e}")
    # A token on the edge between two experts may be rounded to the other side.
    assert error <= 3e-2


@pytest.mark.parametrize("model", [{"layers": "te"}, {"precision": "fp8"}], ids=["bf16", "fp8"])
def test_losses_follow_torchs_layers(hopper, parallel, start, model):
    """Gradients of experts that are scaled twice or not at all; padding of FP8 that reaches the loss."""
    found = []
    for options in ({"layers": "local"}, model):
        chunks = from_checkpoint(start, parallel, **options)
        e = TrainEngine(config(40, **options), MIXTURE, parallel, chunks, [cross_entropy_component()], 40)
        found.append(torch.tensor(losses(e, 40)))
    gap = float(((found[1] - found[0]) / found[0]).abs().max())
    print(f"{model}: loss {found[0][0]:.3f} to {found[0][-1]:.3f}, largest gap {gap:.2%}")
    assert found[0][-1] < 0.95 * found[0][0]
    assert gap <= 0.02
