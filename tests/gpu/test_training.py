"""FP8 in training: loss curves, weights kept in FP8, health, probe, memory savers, resume, export, rollouts."""

import math

import pytest
import torch

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore
from ra3_megatron.checkpoint.weights import CheckpointModel, load_weights
from ra3_megatron.config.sections import CheckpointConfig
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_health import delayed_states
from ra3_megatron.model.precision import fp8_modules, in_bf16, is_quantised, renew_quantised_weights
from ra3_megatron.training.fp8_watch import Fp8Watch
from ra3_megatron.training.optimizer import apply_settings
from tests.gpu.models import SEQ, SMALL, batch, build, engine, losses, packed_logits, relative, with_probe

STEPS, BIN = 200, 20
CURVES: dict[str, list[float]] = {}


def curve(parallel, name, **model):
    """Losses of 200 steps, computed once; printed with -s."""
    if name not in CURVES:
        CURVES[name] = losses(engine(parallel, **model), STEPS)
        print(f"{name}: loss {CURVES[name][0]:.4f} -> {CURVES[name][-1]:.4f}")
    return CURVES[name]


def means(values):
    return [sum(values[i : i + BIN]) / BIN for i in range(0, len(values), BIN)]


def worst_gap(values, reference):
    return max(abs(a - b) / b for a, b in zip(means(values), means(reference), strict=True))


def test_te_bf16_follows_torch_layers(te, parallel):
    """Gradients that are wrong in one layer only show in the curve."""
    te_curve, local = curve(parallel, "te bf16", layers="te"), curve(parallel, "local bf16", layers="local")
    assert te_curve[-1] < te_curve[0] - 1.5
    assert worst_gap(te_curve, local) <= 0.01


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("tensorwise", {"fp8_recipe": "tensorwise"}),
        ("delayed", {"fp8_recipe": "delayed"}),
        ("blockwise", {"fp8_recipe": "blockwise"}),
        ("tensorwise, first and last in BF16", {"bf16_layers_at_start": 1, "bf16_layers_at_end": 1}),
        ("tensorwise, FP8 weights", {"fp8_params": True}),
        ("blockwise, FP8 weights", {"fp8_recipe": "blockwise", "fp8_params": True}),
        ("delayed, FP8 weights", {"fp8_recipe": "delayed", "fp8_params": True}),
    ],
)
def test_fp8_curves_within_one_percent_of_bf16(hopper, parallel, name, model, capfd):
    """Means over 20 steps of 200, each within 1 % of BF16's; and that FP8 ran, by Transformer Engine's own state."""
    reference = curve(parallel, "te bf16", layers="te")
    found = curve(parallel, name, precision="fp8", **model)
    gap = worst_gap(found, reference)
    out = capfd.readouterr().out
    print(f"{name}: largest gap of {BIN}-step means {gap:.3%}")
    assert "linear layers ran in FP8" in out
    assert gap <= 0.01


def test_fp8_weights_are_fp8_and_half_as_large(hopper, parallel):
    """Parameters asked for in FP8 and kept in BF16."""
    e = engine(parallel, precision="fp8", fp8_params=True)
    weights = [m.weight for _, m in fp8_modules(e.chunks)]
    assert all(is_quantised(w) for w in weights)
    kinds = {str(b.param_data.dtype): b.param_data.numel() for b in e.chunks[0].buffers}
    assert kinds["torch.uint8"] >= sum(w.numel() for w in weights)
    before = [w.dequantize().clone() for w in weights]
    losses(e, 2)
    assert not any(torch.equal(a, w.dequantize()) for a, w in zip(before, weights, strict=True))


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_health(hopper, parallel, recipe):
    """Figures per quarter of the layers; none is NaN, and the delayed recipe's scales are its own."""
    e = engine(parallel, precision="fp8", fp8_recipe=recipe, fp8_health_interval=3)
    results = [e.train_step([batch(s), batch(s + 1)], s) for s in range(1, 5)]
    assert results[0].fp8
    assert not results[1].fp8
    found = results[3].fp8
    print({k: f"{v:.3g}" for k, v in found.items()})
    assert all(math.isfinite(v) for v in found.values())
    assert found["fp8_nonfinite"] == 0
    assert all(f"fp8_{k}_amax_{q}" in found for k in ("input", "weight", "gradient") for q in (1, 2, 3, 4))
    if recipe != "blockwise":
        assert found["fp8_input_overflow"] < 0.01
        assert 0 <= found["fp8_input_underflow"] < 0.5
    if recipe == "delayed":
        assert found["fp8_input_scale_1"] > 1


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_probe_leaves_the_state_untouched(hopper, parallel, recipe):
    """A probe in the amax history, in the random numbers, or weights left quantised for the other precision."""
    e = engine(parallel, precision="fp8", fp8_recipe=recipe)
    losses(e, 3)
    before = [t.clone() for t in delayed_states(e.chunks)]
    assert bool(before) == (recipe == "delayed")
    random = torch.cuda.get_rng_state(parallel.device)
    parameters = [p.detach().clone() for p in e.chunks[0].parameters()]
    loss = e.evaluate([batch(3)]).loss
    kept = [t.clone() for t in delayed_states(e.chunks)]
    c = with_probe(e.config, fp8_probe_interval=1)
    watch = Fp8Watch(c.model, e.chunks, parallel, e.vocab)
    found = watch.probe(4, [batch(3)])
    print(f"{recipe}: {found}")
    assert 0 < found["fp8_probe_difference"] < 0.01
    assert found["fp8_probe_gap"] < 0.1
    assert all(torch.equal(a, b) for a, b in zip(kept, delayed_states(e.chunks), strict=True))
    assert torch.equal(random, torch.cuda.get_rng_state(parallel.device))
    assert all(torch.equal(a, b) for a, b in zip(parameters, e.chunks[0].parameters(), strict=True))
    if recipe != "delayed":  # an evaluation's largest values stay in the history, as the recipe has it
        assert e.evaluate([batch(3)]).loss == pytest.approx(loss, rel=1e-6)
    assert math.isfinite(losses(e, 1, first=4)[0])


def test_updated_weights_reach_a_direct_forward_pass(hopper, parallel):
    """A rollout after an update multiplied with the FP8 copies of the weights before it."""
    e = engine(parallel, precision="fp8")
    ids = batch(1).input_ids[:SEQ].to(parallel.device)
    losses(e, 2)
    chunk = e.chunks[0].eval()
    after = packed_logits(chunk, ids, (SEQ,))
    renew_quantised_weights(e.chunks)
    assert torch.equal(after, packed_logits(chunk, ids, (SEQ,)))


@pytest.mark.parametrize(
    "model",
    [
        {"recompute": "full"},
        {"recompute": "full", "recompute_layers": 2},
        {"recompute": "selective", "recompute_modules": ("mlp",)},
        {"offload_layers": 2},
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_memory_savers_change_no_loss(hopper, parallel, model, precision):
    """Activations that come back other than they went; an evaluation in between."""
    plain = engine(parallel, precision=precision)
    saving = engine(parallel, precision=precision, **model)
    for step in range(1, 4):
        a = plain.train_step([batch(step), batch(step + 9)], step)
        b = saving.train_step([batch(step), batch(step + 9)], step)
        assert b.loss == pytest.approx(a.loss, rel=2e-3)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=2e-2)
        assert saving.evaluate([batch(5)]).loss == pytest.approx(plain.evaluate([batch(5)]).loss, rel=2e-3)


def test_fused_weight_gradients(te, parallel):
    """Gradients of a micro-batch written over those of the one before."""
    fused, plain = engine(parallel, layers="te"), engine(parallel, layers="te")
    for module in plain.chunks[0].modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = False
    for step in range(1, 4):
        a = fused.train_step([batch(step), batch(step + 9)], step)
        b = plain.train_step([batch(step), batch(step + 9)], step)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


# ---------------------------------------------------------------- checkpoints


def open_store(folder, parallel):
    settings = CheckpointConfig(timeout_s=60.0, async_save=False)
    return CheckpointStore(folder, settings, parallel, architecture=SMALL)


def save(store, e, step):
    event = store.save(step, e.chunks, e.optimizer, e.scheduler, TrainState("sft", step=step))
    assert event is not None
    assert event.ok, event.message


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        {"layers": "te"},
        {"precision": "fp8"},
        {"precision": "fp8", "fp8_recipe": "delayed"},
        {"precision": "fp8", "fp8_params": True},
    ],
)
def test_resume(hopper, parallel, tmp_path, model, deterministic):
    """Bit for bit with model.deterministic; without, attention's backward pass adds in no fixed order: within 0.1 %."""
    model = {**model, "deterministic": deterministic}
    whole = engine(parallel, **model)
    losses(whole, 4)
    store = open_store(tmp_path, parallel)
    save(store, whole, 4)
    expected = losses(whole, 4, first=5)
    again = engine(parallel, **model)
    store.load(store.latest(), again.chunks, again.optimizer, again.scheduler)
    apply_settings(again.config, again.optimizer, again.scheduler)
    found = losses(again, 4, first=5)
    print(f"{model}: {max(abs(a - b) / b for a, b in zip(found, expected, strict=True)):.2e}")
    if deterministic:
        assert found == expected
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("model", [{}, {"fp8_recipe": "delayed"}, {"fp8_params": True}])
def test_a_checkpoint_of_fp8_is_its_bf16_forward_pass(hopper, parallel, tmp_path, model):
    """What is exported, in torch's layers in fp32, against the trained model with FP8 switched off: within 1 %."""
    e = engine(parallel, precision="fp8", **model)
    losses(e, 20)
    store = open_store(tmp_path, parallel)
    save(store, e, 20)
    folder = store.latest().folder
    assert len(dict(CheckpointModel(folder).hf_tensors())) > 10 * SMALL.num_layers
    [local] = build(SMALL, parallel, seed=9, layers="local", precision="fp32")
    load_weights(folder, [local], SMALL, parallel)
    ids = batch(77).input_ids[:SEQ].to(parallel.device)
    chunk = e.chunks[0].eval()
    with in_bf16(unwrap(chunk).config):
        bf16 = packed_logits(chunk, ids, (SEQ - SEQ // 4, SEQ // 4))
    exported = packed_logits(local.eval(), ids, (SEQ - SEQ // 4, SEQ // 4))
    error = relative(exported, bf16)
    print(f"{model}: export against BF16 forward pass, relative {error:.2e}")
    assert error <= 1e-2


# ---------------------------------------------------------------- rollouts


@pytest.mark.parametrize("model", [{"layers": "te"}, {"layers": "local"}, {"precision": "fp8"}])
def test_rollout_log_probs_are_those_of_training(te, parallel, model):
    """Sampling with other weights or positions than training: the largest gap over forced tokens, in nats."""
    from ra3_megatron.rollout.engine import Extend
    from ra3_megatron.rollout.megatron import MegatronEngine

    if model.get("precision") == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("FP8 needs Hopper or newer here")
    e = engine(parallel, **model)
    losses(e, 20)
    rows = [batch(s).input_ids[:n].tolist() for s, n in ((1, 97), (2, 160), (3, 33))]
    rollouts = MegatronEngine(e.chunks, SMALL, parallel, max_batch=4, max_tokens=256)
    handles = [rollouts.open(ids[:1]) for ids in rows]
    got: list[list[float]] = [[] for _ in rows]
    for start, stop in ((1, 20), (20, 21), (21, 22), (22, 200)):
        extends = [Extend(h, ids[start:stop]) for h, ids in zip(handles, rows, strict=True)]
        with torch.no_grad():
            answers = rollouts.step(extends)
        for values, answer in zip(got, answers, strict=True):
            values += answer.log_probs.tolist()
    for handle in handles:
        rollouts.close(handle)
    lengths = tuple(len(ids) for ids in rows)
    padding = -sum(lengths) % 16
    flat = torch.tensor([t for ids in rows for t in ids] + [0] * padding, device=parallel.device)
    logits = packed_logits(e.chunks[0].eval(), flat, (*lengths, padding) if padding else lengths)
    log_p, worst, start = logits[:, : SMALL.vocab_size].log_softmax(-1), 0.0, 0
    for ids, values in zip(rows, got, strict=True):
        labels = torch.tensor(ids[1:], device=parallel.device)
        expected = log_p[start : start + len(ids) - 1].gather(1, labels[:, None])[:, 0]
        found = torch.tensor(values, device=parallel.device, dtype=torch.float32)
        worst = max(worst, float((found - expected).abs().max()))
        start += len(ids)
    print(f"{model}: largest |log-prob rollout - log-prob training| {worst:.4f} nats")
    assert worst <= (0.6 if model.get("precision") == "fp8" else 0.15)
