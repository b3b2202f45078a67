"""FP8 in the training engine: steps, the proof, health, the probe against BF16, weights kept in FP8."""

import math

import pytest
import torch
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_health import delayed_states
from ra3_megatron.model.precision import fp8_modules, is_quantised
from ra3_megatron.training.fp8_watch import Fp8Diverged
from tests.fake_te.conftest import batch, engine


def losses(e, steps=6):
    return [e.train_step([batch(1), batch(2)], step).loss for step in range(1, steps + 1)]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_training_follows_bf16(parallel, recipe, capfd):
    """Gradients lost on the way through FP8 layers, weights quantised once and for all; and the proof in the log."""
    bf16 = losses(engine(parallel, precision="bf16"))
    fp8 = losses(engine(parallel, precision="fp8", fp8_recipe=recipe))
    assert bf16[-1] < bf16[0] - 0.5
    assert fp8 != bf16
    # A learning rate as high as this drives the two apart later.
    assert all(abs(a - b) < 0.05 * b for a, b in zip(fp8[:3], bf16[:3], strict=True))
    assert fp8[-1] < fp8[0] - 0.5
    said = capfd.readouterr().out
    assert "16 linear layers ran in FP8" in said
    names = {"tensorwise": "Float8CurrentScaling", "delayed": "DelayedScaling", "blockwise": "Float8BlockScaling"}
    assert f"layers 1-4: {names[recipe]}" in said
    assert "TERowParallelLinear, TELayerNormColumnParallelLinear, TEDotProductAttention" in said


def test_weights_kept_in_fp8(parallel):
    """Master weights made of the FP8 numbers instead of the initial ones; updates that never reach the FP8 weights."""
    plain, kept = engine(parallel, precision="fp8"), engine(parallel, precision="fp8", fp8_params=True)
    weights = [m.weight for _, m in fp8_modules(kept.chunks)]
    assert all(is_quantised(w) for w in weights)
    before = [w.dequantize().clone() for w in weights]
    a, b = losses(plain), losses(kept)
    # The same FP8 numbers are multiplied either way; gradients meet the BF16 weight or the FP8 one.
    assert a[0] == b[0]
    assert all(abs(x - y) < 0.02 * x for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, w.dequantize()) for x, w in zip(before, weights, strict=True))


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_health(parallel, recipe):
    """Values of other layers or of BF16's under a quarter, scales that are not those in use."""
    e = engine(parallel, precision="fp8", fp8_recipe=recipe, fp8_health_interval=2)
    first = e.train_step([batch(1), batch(2)], 1)
    assert not e.train_step([batch(1), batch(2)], 2).fp8
    found = e.train_step([batch(1), batch(2)], 3).fp8
    assert found["fp8_nonfinite"] == 0
    weights = [m.weight for name, m in fp8_modules(e.chunks) if name.startswith("3.")]
    assert found["fp8_weight_amax_3"] > 0
    assert all(f"fp8_{kind}_amax_{q}" in found for kind in ("input", "weight", "gradient") for q in (1, 2, 3, 4))
    if recipe == "blockwise":
        assert not any("scale" in name or "flow" in name for name in found)
        return
    assert {f"fp8_{k}_{f}flow" for k in ("input", "weight", "gradient") for f in ("over", "under")} <= set(found)
    if recipe == "tensorwise":
        assert found["fp8_input_scale_1"] == pytest.approx(448 / found["fp8_input_amax_1"])
        assert found["fp8_input_overflow"] == found["fp8_weight_overflow"] == 0
        # The figures are of the weights before the update.
        assert found["fp8_weight_amax_3"] == pytest.approx(max(float(w.abs().max()) for w in weights), rel=0.2)
    else:
        assert first.fp8["fp8_input_scale_1"] == 1.0
        assert found["fp8_input_scale_1"] > 1.0


def test_overflow_is_counted(parallel):
    """A scale too large for what comes: values that are cut off are the first sign of a spike."""
    e = engine(parallel, precision="fp8", fp8_recipe="delayed", fp8_health_interval=1)
    e.train_step([batch(1)] * 2, 1)
    for module in (m for name, m in fp8_modules(e.chunks) if name == "2.mlp.linear_fc2"):
        module.fp8_meta["scaling_fwd"].scale[0] *= 1e4
    assert 0 < e.train_step([batch(1)] * 2, 2).fp8["fp8_input_overflow"] < 0.25


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_probe_changes_nothing(parallel, recipe):
    """A probe that left its values in the history of the delayed recipe, or the model without gradients."""
    seen = []
    for settings in ({"fp8_probe_interval": 2, "fp8_probe_limit": math.inf}, {}):
        FP8GlobalStateManager.reset()
        e = engine(parallel, precision="fp8", fp8_recipe=recipe, **settings)
        torch.manual_seed(5)
        results = [e.train_step([batch(step), batch(step + 9)], step) for step in range(1, 5)]
        numbers = [(r.loss, r.grad_norm) for r in results]
        seen.append((numbers, [t.clone() for t in delayed_states(e.chunks)], torch.rand(1)))
        # The delayed recipe has no scales before the first step.
        assert [bool(r.fp8) for r in results] == [bool(settings) and recipe != "delayed", False, bool(settings), False]
        assert all(0 < r.fp8["fp8_probe_difference"] < 0.1 for r in results if r.fp8)
    (numbers, states, drawn), (plain_numbers, plain_states, plain_drawn) = seen
    assert numbers == plain_numbers
    assert torch.equal(drawn, plain_drawn)
    assert len(states) == (0 if recipe == "tensorwise" else 16 * 4 + 4 * 4)
    assert all(torch.equal(x, y) for x, y in zip(states, plain_states, strict=True))


def test_probe_measures_the_two_losses(parallel):
    """The loss of other tokens, of other weights, or of FP8 twice."""
    e = engine(parallel, precision="fp8", fp8_probe_interval=1)
    bf16 = engine(parallel, precision="bf16")
    found = e.train_step([batch(7), batch(8)], 1).fp8
    assert found["fp8_probe_bf16_loss"] == pytest.approx(bf16.evaluate([batch(7)]).loss, rel=1e-6)
    twin = engine(parallel, precision="fp8")
    assert found["fp8_probe_loss"] == pytest.approx(twin.evaluate([batch(7)]).loss, rel=1e-6)
    gap = abs(found["fp8_probe_loss"] - found["fp8_probe_bf16_loss"])
    assert found["fp8_probe_difference"] == pytest.approx(gap / found["fp8_probe_bf16_loss"])
    assert found["fp8_probe_gap"] >= gap


def test_probe_stops_a_run_that_diverges(parallel):
    """FP8 that computed nonsense trained on until somebody looked at the curve."""
    e = engine(parallel, precision="fp8", fp8_probe_interval=1, fp8_probe_limit=1e-7)
    with pytest.raises(Fp8Diverged, match=r"step 1: loss .* in FP8 \(tensorwise\).*fp8_probe_limit"):
        e.train_step([batch(1), batch(2)], 1)


def test_gradients_go_straight_into_the_buffer(parallel):
    """The fusion left off, or switched on in a model without buffers, where the first backward pass fails."""
    e = engine(parallel, precision="bf16")
    linears = [m for m in e.chunks[0].modules() if hasattr(m, "fuse_wgrad_accumulation")]
    assert len(linears) == 16
    assert all(m.fuse_wgrad_accumulation for m in linears)
    assert not unwrap(e.chunks[0]).output_layer.gradient_accumulation_fusion


@pytest.mark.parametrize("recompute", [{"recompute": "full"}, {"recompute": "full", "recompute_layers": 2}, "mlp"])
def test_recompute_changes_nothing(parallel, recompute):
    """Layers that were made again in BF16, or whole layers where some were asked for."""
    chosen = recompute if recompute != "mlp" else {"recompute": "selective", "recompute_modules": ("mlp",)}
    plain = engine(parallel, precision="fp8").train_step([batch(1), batch(2)], 1)
    saving = engine(parallel, precision="fp8", **chosen)
    found = saving.train_step([batch(1), batch(2)], 1)
    assert (found.loss, found.grad_norm) == (plain.loss, plain.grad_norm)
    c = unwrap(saving.chunks[0]).config
    expected = {"full": ("uniform", 1)} | ({"full": ("block", 2)} if "recompute_layers" in chosen else {})
    assert (c.recompute_method, c.recompute_num_layers) == expected.get(c.recompute_granularity, (None, None))
