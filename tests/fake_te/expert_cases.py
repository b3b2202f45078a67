"""Experts as Megatron-Core's groups on Transformer Engine, against torch's one after the other."""

from dataclasses import replace

import pytest
import torch

from ra3_megatron.checkpoint.capture import model_state, put_back_models
from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.checkpoint.hashing import hash_parameters
from ra3_megatron.checkpoint.hf_mapping import live_hf_tensors
from ra3_megatron.model.experts import moe_layers
from ra3_megatron.model.factory import build_chunks, unwrap
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine
from tests.fake_te.conftest import ARCH, batch, config

MIXTURE = replace(
    ARCH, family="qwen3_moe", num_experts=4, experts_per_token=2, expert_ffn_hidden_size=48, norm_topk_prob=True
)


def build(parallel, use_te, seed=1, **model):
    seed_everything(seed, parallel)
    return build_chunks(MIXTURE, config(**model).model, parallel, use_te)


def carried(parallel, folder, source, target):
    """`target` with what a checkpoint of `source` holds."""
    save_sharded(folder, model_state(source, parallel), parallel)
    put_back_models(target, load_sharded(folder, model_state(target, parallel), parallel))
    return target


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoints_of_either_load_into_the_other(tmp_path, parallel, precision):
    """Experts under other keys, numbered from another one, or gate and up cut apart in another place."""
    local = build(parallel, False, precision=precision)
    grouped = build(parallel, True, seed=2, precision=precision)
    names = {type(moe.experts).__name__ for c in grouped for moe in moe_layers(unwrap(c))}
    assert names == {"TEGroupedMLP"}
    assert hash_parameters(local, parallel) != hash_parameters(grouped, parallel)
    carried(parallel, tmp_path / "there", local, grouped)
    assert hash_parameters(local, parallel) == hash_parameters(grouped, parallel)
    for one, other in zip(*(moe_layers(unwrap(c[0])) for c in (local, grouped)), strict=True):
        for number, expert in enumerate(one.experts.local_experts):
            assert torch.equal(expert.linear_fc1.weight, getattr(other.experts.linear_fc1, f"weight{number}"))
            assert torch.equal(expert.linear_fc2.weight, getattr(other.experts.linear_fc2, f"weight{number}"))
    again = carried(parallel, tmp_path / "back", grouped, build(parallel, False, seed=3, precision=precision))
    assert hash_parameters(local, parallel) == hash_parameters(again, parallel)
    parts = [dict(live_hf_tensors(dict(unwrap(c[0]).named_parameters()), MIXTURE)) for c in (local, grouped)]
    assert all(torch.equal(parts[0][name], tensor) for name, tensor in parts[1].items())


def test_grouped_experts_learn_as_torchs_do(tmp_path, parallel):
    """Weights of the router on other tokens, and gradients of experts that reach no optimizer."""
    settings = config(precision="fp32")
    local = build(parallel, False, precision="fp32")
    grouped = carried(parallel, tmp_path / "start", local, build(parallel, True, seed=2, precision="fp32"))
    found = []
    for chunks in (local, grouped):
        engine = TrainEngine(settings, MIXTURE, parallel, chunks, [cross_entropy_component()], 10)
        assert len(engine.optimizer.chained_optimizers) == 2
        assert all(not p.allreduce for moe in moe_layers(unwrap(chunks[0])) for p in moe.experts.parameters())
        with torch.compiler.set_stance("force_eager"):  # compiling the fused activation takes longer than all of this
            found.append([engine.train_step([batch(2 * s), batch(2 * s + 1)], s) for s in range(1, 4)])
    for step, (torchs, te) in enumerate(zip(*found, strict=True)):
        # Adam's first steps have the size of the rate, whatever small gradients round to.
        tolerance = 1e-5 if step == 0 else 1e-3
        assert te.loss == pytest.approx(torchs.loss, rel=tolerance)
        assert te.grad_norm == pytest.approx(torchs.grad_norm, rel=tolerance)
