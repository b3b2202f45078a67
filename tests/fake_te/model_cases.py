"""Which layers are built, with which recipe, and that they compute what the torch layers do."""

import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model import precision
from ra3_megatron.model.attention import packed_params
from ra3_megatron.model.factory import build_chunks, choose_layers, unwrap
from ra3_megatron.parallel.groups import seed_everything
from tests.fake_te.conftest import ARCH

IDS = torch.randint(0, ARCH.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
LENGTHS = (20, 28)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]

CURRENT, DELAYED, BLOCK = "Float8CurrentScaling HYBRID", "DelayedScaling HYBRID", "Float8BlockScaling E4M3"


def build(parallel, use_te=True, **model):
    seed_everything(1, parallel)
    return build_chunks(ARCH, ModelConfig(vocab_multiple=8, **model), parallel, use_te)


def logits(chunk, parallel):
    return chunk(IDS, POSITIONS, None, packed_seq_params=packed_params(LENGTHS, parallel.device))


def with_weights_of(local, chunk):
    """The same parameters under the same names; only extra states may be missing."""
    weights = {k: v for k, v in unwrap(local).state_dict().items() if not k.endswith("_extra_state")}
    found = unwrap(chunk).load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert all(k.endswith("_extra_state") for k in found.missing_keys)
    return chunk


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        ({"precision": "fp8"}, [CURRENT] * 4),
        ({"precision": "fp8", "fp8_format": "e4m3"}, ["Float8CurrentScaling E4M3"] * 4),
        ({"precision": "fp8", "fp8_recipe": "delayed"}, [DELAYED] * 4),
        ({"precision": "fp8", "fp8_recipe": "blockwise", "bf16_layers_at_start": 1}, ["BF16"] + [BLOCK] * 3),
        ({"precision": "fp8", "bf16_layers_at_start": 1, "bf16_layers_at_end": 2}, ["BF16", CURRENT, "BF16", "BF16"]),
        ({"precision": "fp8", "fp8_recipe": "mxfp8"}, ["MXFP8BlockScaling E4M3"] * 4),
        (
            {"precision": "fp8", "fp8_recipe": "nvfp4", "bf16_layers_at_end": 1},
            ["NVFP4BlockScaling E2M1"] * 3 + ["BF16"],
        ),
        ({"precision": "bf16"}, ["BF16"] * 4),
        ({"precision": "fp32"}, ["fp32"] * 4),
    ],
)
def test_layers_and_recipe_as_asked(parallel, model, numbers):
    """A recipe under another name, the wrong format for it, layers in BF16 at the wrong end: by what really runs."""
    settings = ModelConfig(vocab_multiple=8, **model)
    chunks = build(parallel, **model)
    facts = precision.layer_facts(chunks)
    assert [f.numbers for f in facts] == numbers
    assert {f.attention for f in facts} == {"TEDotProductAttention"}
    assert {c for f in facts for c in f.linears} == {"TERowParallelLinear", "TELayerNormColumnParallelLinear"}
    with torch.no_grad():
        logits(chunks[0].train(), parallel)
    quantised = {name.partition(".")[0] for name, module in precision.fp8_modules(chunks) if module.fp8_initialized}
    assert quantised == {str(i + 1) for i, n in enumerate(numbers) if n not in ("BF16", "fp32")}
    line = precision.require_fp8(chunks, settings)
    assert ("ran in FP8" in line) == (settings.precision == "fp8")


def test_delayed_settings_reach_the_recipe(parallel):
    """Megatron's defaults, a history of one, were used whatever was asked for."""
    chunks = build(parallel, precision="fp8", fp8_recipe="delayed", fp8_amax_history=7, fp8_amax_algo="most_recent")
    logits(chunks[0], parallel)
    meta = precision.fp8_modules(chunks)[0][1].fp8_meta
    assert (meta["recipe"].amax_history_len, meta["recipe"].amax_compute_algo) == (7, "most_recent")
    assert meta["scaling_fwd"].amax_history.shape[0] == 7


def test_fp32_equals_the_torch_layers(parallel):
    """Other positions in the fused rotary embedding (the table per token instead of per sequence), another mask."""
    local = build(parallel, use_te=False, precision="fp32")[0]
    chunk = with_weights_of(local, build(parallel, precision="fp32")[0])
    with torch.no_grad():
        assert torch.equal(logits(chunk, parallel), logits(local, parallel))


def test_fp8_is_near_bf16_and_can_be_switched_off(parallel):
    """Switched off it must be BF16 exactly, and on again afterwards."""
    local = build(parallel, use_te=False, precision="fp32")[0]
    bf16 = with_weights_of(local, build(parallel, precision="bf16")[0])
    chunk = with_weights_of(local, build(parallel, precision="fp8")[0])
    with torch.no_grad():
        reference, first = logits(bf16, parallel), logits(chunk, parallel)
        with precision.in_bf16(unwrap(chunk).config):
            switched = logits(chunk, parallel)
        again = logits(chunk, parallel)
    assert torch.equal(switched, reference)
    assert torch.equal(again, first)
    assert 0.002 < (first - reference).norm() / reference.norm() < 0.1


def test_weights_that_changed_are_quantised_anew(parallel):
    """A rollout after an update went on with the FP8 copies of the weights before it."""
    chunk = build(parallel, precision="fp8")[0]
    with torch.no_grad():
        before = logits(chunk, parallel)
        for p in chunk.parameters():
            p.mul_(1.5)
        stale = logits(chunk, parallel)
        precision.renew_quantised_weights([chunk])
        fresh = logits(chunk, parallel)
    rebuilt = build(parallel, precision="fp8")[0]
    with torch.no_grad():
        for p in rebuilt.parameters():
            p.mul_(1.5)
        assert torch.equal(fresh, logits(rebuilt, parallel))
    assert not torch.equal(stale, fresh)
    assert not torch.equal(before, fresh)


def test_fp8_asked_for_and_not_run_is_an_error(parallel):
    """Layers that never entered an FP8 context, and torch layers under an FP8 configuration: both trained in BF16."""
    settings = ModelConfig(vocab_multiple=8, precision="fp8")
    chunks = build(parallel, precision="fp8")
    with precision.in_bf16(unwrap(chunks[0]).config):
        logits(chunks[0], parallel)
    with pytest.raises(precision.Fp8NotInUse, match="did not run in FP8"):
        precision.require_fp8(chunks, settings)
    with pytest.raises(precision.Fp8NotInUse, match="LayerNormColumnParallelLinear"):
        build(parallel, use_te=False, precision="fp8")
    plain = build(parallel, precision="fp8")
    with pytest.raises(precision.Fp8NotInUse, match="fp8_params is true"):
        precision.refuse_silent_bf16(plain, ModelConfig(precision="fp8", fp8_params=True))


def test_packed_windows_as_transformer_engine_wants_them(parallel):
    """int32 boundaries on the device and lengths as numbers: else every layer waits for the device."""
    chunk = build(parallel, precision="bf16")[0]
    with torch.no_grad():
        logits(chunk, parallel)
    seen = unwrap(chunk).decoder.layers[0].self_attention.core_attention.seen
    assert (seen["qkv_format"], seen["max_seqlen_q"], seen["attn_mask_type"]) == ("thd", 28, "padding_causal")


def test_chips_are_asked(monkeypatch):
    """mxfp8 on Hopper failed in the first forward pass, after everything was loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_layers(ModelConfig(precision="fp8", fp8_recipe="blockwise")).use_te
    with pytest.raises(UserError, match=r"mxfp8 on NVIDIA H200 .*9\.0.*10\.0.*use model.fp8_recipe=delayed or"):
        choose_layers(ModelConfig(precision="fp8", fp8_recipe="mxfp8"))
    # fp32 has no fused attention in Transformer Engine.
    assert not choose_layers(ModelConfig(precision="fp32")).use_te
    assert choose_layers(ModelConfig(precision="bf16")).use_te
