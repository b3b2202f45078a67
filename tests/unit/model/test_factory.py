"""Models against Hugging Face's, settings that must be refused, parameter names."""

import logging
import warnings

import pytest
import torch

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model import factory, optional
from ra3_megatron.model.attention import packed_params
from ra3_megatron.model.factory import build_model, build_transformer_config, padded_vocab_size, unwrap
from ra3_megatron.parallel.groups import ParallelSizes
from tests.unit.model.hf_pairs import ARCHITECTURES, load, megatron_weights, random_hf

VOCAB = 131
MODEL = ModelConfig(vocab_multiple=8)


def _pair(name, parallel, model=MODEL):
    arch = ARCHITECTURES[name]
    hf = random_hf(arch)
    [chunk] = build_model(arch, model, parallel)
    load([unwrap(chunk)], megatron_weights(arch, hf, padded_vocab_size(VOCAB, 8, 1)), parallel)
    return hf, chunk.eval()


def _ids(*shape, seed=3):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_hugging_face(parallel, name):
    """Identical weights, other logits: wrong QKV order, rope constants (not Llama 3's 1/4/8192 here), eps, bias."""
    hf, chunk = _pair(name, parallel)
    ids = _ids(3, 100)
    positions = torch.arange(100).expand(3, -1)
    with torch.no_grad():
        gap = hf(ids).logits - chunk(ids, positions, None)[..., :VOCAB]
    assert gap.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_separate(parallel, name):
    """Positions that run on over a boundary, and a cached table of the window before."""
    _, chunk = _pair(name, parallel)
    for lengths in ((7, 30, 1, 12), (12, 1, 30, 7), (50,)):
        ids = _ids(1, sum(lengths))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        with torch.no_grad():
            packed = chunk(ids, positions, None, packed_seq_params=packed_params(lengths, parallel.device))
            alone = [chunk(part, torch.arange(part.shape[1])[None], None) for part in ids.split(list(lengths), dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_decoding_with_a_cache_equals_a_full_forward(parallel):
    """Tokens forced several at a time after sampled ones: stock Megatron turns the mask off and they see the future."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    _, chunk = _pair("qwen2", parallel)
    ids, positions = _ids(2, 20), torch.arange(20).expand(2, -1)
    with torch.no_grad():
        full = chunk(ids, positions, None)
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=32)
        context.config.materialize_only_last_token_logits = False
        got, at = [], 0
        with InferenceMode.active():
            for n in (8, 1, 1, 5, 1, 4):
                part = slice(at, at + n)
                got.append(
                    chunk(ids[:, part], positions[:, part], None, inference_context=context, runtime_gather_output=True)
                )
                context.sequence_len_offset += n
                at += n
    torch.testing.assert_close(torch.cat(got, dim=1), full, rtol=0, atol=1e-5)


def test_bf16_and_recompute(parallel):
    """Recompute must change memory only; bf16 must really be bf16."""
    hf, chunk = _pair("qwen3", parallel, ModelConfig(vocab_multiple=8, precision="bf16"))
    assert {p.dtype for p in chunk.parameters()} == {torch.bfloat16}
    ids, positions = _ids(1, 40), torch.arange(40)[None]
    with torch.no_grad():
        assert (hf(ids).logits - chunk(ids, positions, None)[..., :VOCAB]).abs().max() < 0.1
    grads = []
    for recompute in ("none", "selective", "full"):
        _, chunk = _pair("qwen3", parallel, ModelConfig(vocab_multiple=8, recompute=recompute))
        chunk.train()
        chunk(ids, positions, None).float().logsumexp(-1).sum().backward()
        grads.append([p.grad for p in chunk.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_parameter_names_are_transformer_engines(parallel):
    """A checkpoint of one layer specification could not be read by the other."""
    [chunk] = build_model(ARCHITECTURES["qwen3"], MODEL, parallel)
    layer = {n.removeprefix("decoder.layers.0.") for n, _ in chunk.named_parameters() if "layers.0." in n}
    assert layer == {
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight", "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
    }  # fmt: skip
    # Resharding cuts gate and up apart by this mark.
    assert chunk.decoder.layers[0].mlp.linear_fc1.weight.partition_stride == 2


def test_building_says_nothing(parallel, caplog, recwarn):
    """The deprecation line of GPTModel and Megatron's own default drowned the log of every start."""
    warnings.simplefilter("always")
    with caplog.at_level(logging.INFO):
        build_model(ARCHITECTURES["qwen2"], MODEL, parallel)
    assert "DEPRECATED" not in caplog.text
    assert not [w for w in recwarn if "full scope" in str(w.message)]
    assert factory.choose_layers(MODEL).reason in caplog.text


def test_fp8_without_transformer_engine_is_refused():
    """Asked for FP8 without Transformer Engine, Megatron trains in BF16 with no word."""
    if optional.have_te():
        pytest.skip("Transformer Engine is usable here")
    with pytest.raises(UserError, match=r"fp8 needs Transformer Engine.*\[te\]"):
        factory.choose_layers(ModelConfig(precision="fp8"))
    with pytest.raises(UserError, match=r"layers te needs Transformer Engine"):
        factory.choose_layers(ModelConfig(layers="te"))
    with pytest.raises(UserError, match="only in Transformer Engine"):
        factory.choose_layers(ModelConfig(precision="fp8", layers="local"))
    assert not factory.choose_layers(ModelConfig()).use_te


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (ParallelSizes(tensor=3), r"num_heads \(4\)"),
        (ParallelSizes(tensor=4), r"num_kv_heads \(2\)"),
        (ParallelSizes(pipeline=3), r"num_layers \(2\)"),
    ],
)
def test_sizes_that_do_not_divide_the_model(sizes, text):
    """The assertion inside Megatron named neither the setting nor a cure."""
    with pytest.raises(UserError, match=text):
        build_transformer_config(ARCHITECTURES["qwen2"], ModelConfig(), sizes, False, False)


def test_padded_vocabulary():
    """Rows must divide among the tensor-parallel ranks; nothing is padded without need."""
    assert padded_vocab_size(131, 8, 1) == 136
    assert padded_vocab_size(131, 8, 2) == 144
    assert padded_vocab_size(128, 128, 1) == 128
    with pytest.raises(UserError):
        padded_vocab_size(0, 8, 1)


def test_parameter_count_of_the_architecture(parallel):
    """The estimate shown by the dry run must be what is built."""
    for arch in ARCHITECTURES.values():
        [chunk] = build_model(arch, ModelConfig(vocab_multiple=1), parallel)
        assert sum(p.numel() for p in chunk.parameters()) == arch.parameter_count
    assert Architecture().parameter_count > 0
