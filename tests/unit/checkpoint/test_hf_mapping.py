"""Mapping rules between Hugging Face and Megatron tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.checkpoint.hf_mapping import (
    check_tensors,
    compare_tensors,
    hf_shapes,
    layer_rules,
    live_hf_tensors,
    units,
)
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError


@st.composite
def architectures(draw):
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe"]))
    kv_heads = draw(st.integers(1, 3))
    experts = {}
    if family == "qwen3_moe":
        count = draw(st.integers(1, 4))
        experts = {"num_experts": count, "experts_per_token": draw(st.integers(1, count))}
        experts["expert_ffn_hidden_size"] = draw(st.integers(1, 9))
    return Architecture(
        family=family,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 12)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 11)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        **experts,
    )


@given(architectures())
@settings(max_examples=60, deadline=None)
def test_split_undoes_merge(arch):
    """Every value comes back to its place, for any head grouping, head width and size (GQA interleave, gate/up)."""
    for unit in units(arch):
        shapes = unit.hf_shapes(arch)
        parts, start = [], 0
        for shape in shapes.values():
            count = torch.Size(shape).numel()
            parts.append(torch.arange(start, start + count).reshape(shape))
            start += count
        merged = unit.rule.merge(parts, arch)
        assert tuple(merged.shape) == unit.rule.shape(arch)
        assert merged.numel() == start
        for part, back in zip(parts, unit.rule.split(merged, arch), strict=True):
            assert torch.equal(part, back)


@given(architectures())
@settings(max_examples=30, deadline=None)
def test_parameter_count_is_that_of_the_architecture(arch):
    """A rule left out for a family (bias, q/k norm, output layer) would drop weights without a word."""
    assert sum(torch.Size(shape).numel() for shape in hf_shapes(arch).values()) == arch.parameter_count


@pytest.mark.parametrize("names", [0, -1], ids=["one after the other", "grouped"])
def test_live_experts_are_found_under_either_name(names):
    """Transformer Engine's grouped experts have one module for all; an expert's tensors must not be another's."""
    arch = Architecture(
        "qwen3_moe", 2, 8, 2, 1, 4, 8, 11, False, False, True,
        num_experts=3, experts_per_token=2, expert_ffn_hidden_size=6,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    live, expected = {}, {}
    for unit in units(arch):
        tensor = torch.randn(unit.rule.shape(arch), generator=generator)
        live[unit.names[names]] = tensor
        expected |= dict(zip(unit.hf_shapes(arch), unit.rule.split(tensor, arch), strict=True))
    assert f"decoder.layers.1.mlp.experts.{('local_experts.2.linear_fc1.weight', 'linear_fc1.weight2')[names]}" in live
    found = dict(live_hf_tensors(live, arch))
    assert list(found) == list(hf_shapes(arch))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_qkv_rows_lie_group_by_group():
    """Cutting the rows evenly must hand each tensor-parallel rank whole groups: 4 query heads, 2 key/value heads."""
    arch = Architecture(num_heads=4, num_kv_heads=2, head_dim=2, hidden_size=1)
    [rule] = [r for r in layer_rules(arch) if r.megatron == "self_attention.linear_qkv.weight"]
    q = torch.tensor([[10 * head + row] for head in range(4) for row in range(2)])
    k, v = [base + torch.tensor([[10 * head + row] for head in range(2) for row in range(2)]) for base in (100, 200)]
    rows = rule.merge([q, k, v], arch)[:, 0].tolist()
    assert rows == [0, 1, 10, 11, 100, 101, 200, 201, 20, 21, 30, 31, 110, 111, 210, 211]


def test_differences_are_named_and_never_dropped():
    """Missing, extra and mis-shaped tensors were dropped silently by other converters (whole shards got lost)."""
    arch = Architecture(num_layers=1, vocab_size=7, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=2)
    good = hf_shapes(arch)
    assert check_tensors(good, arch, "here").ok
    bad = dict(good)
    del bad["model.norm.weight"]
    bad["model.layers.1.mlp.up_proj.weight"] = (1,)
    bad["model.embed_tokens.weight"] = (8, 4)
    found = compare_tensors(bad, arch)
    assert found.missing == ("model.norm.weight",)
    assert found.extra == ("model.layers.1.mlp.up_proj.weight",)
    assert found.misshaped == ("model.embed_tokens.weight: found [8, 4], expected [7, 4]",)
    with pytest.raises(UserError, match=r"1 missing \(model.norm.weight\); 1 extra .*; 1 misshaped"):
        check_tensors(bad, arch, "here")


def test_only_listed_buffers_are_ignored():
    """The ignore list is explicit; a tied model may store its output layer, an untied one must."""
    tied = Architecture(num_layers=1, tied_embeddings=True)
    names = {**hf_shapes(tied), "model.layers.0.self_attn.rotary_emb.inv_freq": (16,)}
    names["lm_head.weight"] = names["model.embed_tokens.weight"]
    found = compare_tensors(names, tied)
    assert found.ok
    assert found.ignored == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    names["lm_head.weight"] = (1, 1)
    assert compare_tensors(names, tied).extra == ("lm_head.weight",)
    untied = Architecture(num_layers=1, tied_embeddings=False)
    assert compare_tensors(hf_shapes(tied), untied).missing == ("lm_head.weight",)
