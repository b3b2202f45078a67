"""Checkpoints of FP8 training: resumed equals continuous, into other layers and back, weights kept in FP8."""

import pytest
import torch
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from ra3_megatron.checkpoint.capture import model_state, put_back_models
from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.checkpoint.hashing import hash_parameters
from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore
from ra3_megatron.checkpoint.weights import CheckpointModel
from ra3_megatron.config.sections import CheckpointConfig
from ra3_megatron.model.factory import build_chunks, unwrap
from ra3_megatron.model.precision import fp8_modules, is_quantised
from ra3_megatron.training.optimizer import apply_settings
from tests.fake_te.conftest import ARCH, batch, config, engine

RECIPES = [
    {"fp8_recipe": "tensorwise"},
    {"fp8_recipe": "delayed", "fp8_amax_history": 4},
    {"fp8_recipe": "blockwise", "bf16_layers_at_start": 1},
    {"fp8_recipe": "tensorwise", "fp8_params": True},
]


def open_store(folder, parallel):
    return CheckpointStore(folder, CheckpointConfig(timeout_s=20.0, async_save=False), parallel, architecture=ARCH)


def save(store, e, step=3):
    event = store.save(step, e.chunks, e.optimizer, e.scheduler, TrainState("sft", step=step))
    assert event.ok, event.message


@pytest.mark.parametrize("model", RECIPES)
def test_resumed_equals_continuous(tmp_path, parallel, model):
    """Scales that start anew, FP8 weights a rounding off, master weights made of the random initial ones."""

    def steps(e, first, last):
        return [e.train_step([batch(s), batch(s + 50)], s) for s in range(first, last + 1)]

    whole = engine(parallel, precision="fp8", **model)
    steps(whole, 1, 3)
    store = open_store(tmp_path, parallel)
    save(store, whole)
    expected = [(r.loss, r.grad_norm) for r in steps(whole, 4, 6)]
    FP8GlobalStateManager.reset()
    again = engine(parallel, precision="fp8", **model)
    store.load(store.latest(), again.chunks, again.optimizer, again.scheduler)
    apply_settings(again.config, again.optimizer, again.scheduler)
    assert [(r.loss, r.grad_norm) for r in steps(again, 4, 6)] == expected


def test_scales_are_tensors_and_come_back(tmp_path, parallel):
    """Transformer Engine's own state is a pickle, which it refuses to load; and a history of another length."""
    model = {"precision": "fp8", "fp8_recipe": "delayed"}
    e = engine(parallel, fp8_amax_history=4, **model)
    for step in range(1, 8):
        e.train_step([batch(step)] * 2, step)
    state = model_state(e.chunks, parallel)
    states = {k: v.data for k, v in state["model0"].items() if k.endswith("linear_fc2._extra_state")}
    assert len(states) == 4
    assert all(s["num_gemms"] == 1 and s["amax_history_fwd"].shape == (4, 3) for s in states.values())
    save_sharded(tmp_path / "dist", state, parallel)
    for length in (4, 3, 6):
        FP8GlobalStateManager.reset()
        other = engine(parallel, fp8_amax_history=length, **model)
        put_back_models(other.chunks, load_sharded(tmp_path / "dist", model_state(other.chunks, parallel), parallel))
        for (_, a), (_, b) in zip(fp8_modules(e.chunks), fp8_modules(other.chunks), strict=True):
            old, new = a.fp8_meta["scaling_fwd"], b.fp8_meta["scaling_fwd"]
            assert torch.equal(old.scale, new.scale)
            kept = min(length, 4) - 1
            assert torch.equal(old.amax_history[-kept:], new.amax_history[-kept:])
            assert torch.equal(old.amax_history[0], new.amax_history[0])
            assert not new.amax_history[1:-kept].any()


@pytest.mark.parametrize("model", RECIPES)
def test_into_torch_layers_and_back(tmp_path, parallel, model):
    """A checkpoint of one kind of layers that the other could not read: an extra state missing, or one too many."""
    e = engine(parallel, precision="fp8", **model)
    e.train_step([batch(1), batch(2)], 1)
    store = open_store(tmp_path, parallel)
    save(store, e, 1)
    local = build_chunks(ARCH, config(precision="bf16", layers="local").model, parallel, False)
    folder = store.latest().dist
    put_back_models(local, load_sharded(folder, model_state(local, parallel), parallel))
    for (name, a), b in zip(unwrap(e.chunks[0]).named_parameters(), local[0].parameters(), strict=True):
        plain = a.dequantize() if is_quantised(a) else a
        assert torch.equal(plain.detach(), b.detach()), name
    # What the writer hashed is what torch's layers hold.
    assert hash_parameters(local, parallel, ARCH.vocab_size) == store.latest().parameters_sha256
    save_sharded(tmp_path / "local", model_state(local, parallel), parallel)
    FP8GlobalStateManager.reset()
    back = engine(parallel, precision="fp8", **model)
    put_back_models(back.chunks, load_sharded(tmp_path / "local", model_state(back.chunks, parallel), parallel))
    for (name, a), b in zip(unwrap(back.chunks[0]).named_parameters(), local[0].parameters(), strict=True):
        if not is_quantised(a):
            assert torch.equal(a.detach(), b.detach()), name


def test_export_reads_what_the_forward_pass_multiplied(tmp_path, parallel):
    """Weights kept in FP8 that were written as their eight bits, or as the master weights they were rounded from."""
    e = engine(parallel, precision="fp8", fp8_params=True)
    e.train_step([batch(1), batch(2)], 1)
    store = open_store(tmp_path, parallel)
    save(store, e, 1)
    tensors = dict(CheckpointModel(store.latest().folder).hf_tensors())
    down = unwrap(e.chunks[0]).decoder.layers[2].mlp.linear_fc2.weight
    assert torch.equal(tensors["model.layers.2.mlp.down_proj.weight"], down.dequantize())
    gate_up = unwrap(e.chunks[0]).decoder.layers[1].mlp.linear_fc1.weight.dequantize()
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], gate_up[ARCH.ffn_hidden_size :])


def test_loaded_weights_are_the_optimizers(tmp_path, parallel):
    """With weights in FP8 the optimizer began from the random weights the model was built with, not those loaded."""
    source = engine(parallel, precision="bf16")
    source.train_step([batch(1), batch(2)], 1)
    save_sharded(tmp_path / "dist", model_state(source.chunks, parallel), parallel)
    target = build_chunks(ARCH, config(precision="fp8", fp8_params=True).model, parallel, True)
    put_back_models(target, load_sharded(tmp_path / "dist", model_state(target, parallel), parallel))
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    loaded = dict(unwrap(target[0]).named_parameters())[name]
    assert torch.equal(loaded.get_high_precision_init_val(), dict(unwrap(source.chunks[0]).named_parameters())[name])


@pytest.mark.parametrize("kept", [False, True])
def test_delayed_scales_start_from_the_weights(tmp_path, parallel, kept):
    """A base model of another program has no scales: at 1 its weights lost most of their bits, for a whole stage."""
    source = engine(parallel, precision="bf16")
    save_sharded(tmp_path / "dist", model_state(source.chunks, parallel), parallel)
    FP8GlobalStateManager.reset()
    target = build_chunks(ARCH, config(precision="fp8", fp8_recipe="delayed", fp8_params=kept).model, parallel, True)
    put_back_models(target, load_sharded(tmp_path / "dist", model_state(target, parallel), parallel))
    weights = dict(unwrap(source.chunks[0]).named_parameters())
    for name, module in unwrap(target[0]).named_modules():
        if f"{name}.weight" in weights and hasattr(module, "fp8_meta"):
            amax = float(weights[f"{name}.weight"].abs().max())
            state = module.fp8_meta["scaling_fwd"]
            assert float(state.scale[1]) == pytest.approx(448 / amax)
            assert float(state.scale[0]) == 1.0
            assert not state.amax_history.any()
