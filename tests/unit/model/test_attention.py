"""Core attention against a written-out softmax; the context-parallel partition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.attention import (
    SDPACoreAttention,
    _token_order,
    all_sequences,
    context_parallel_share,
    packed_layout,
    packed_params,
    set_prefixes,
)
from ra3_megatron.model.factory import build_transformer_config
from tests.unit.model.hf_pairs import ARCHITECTURES
from tests.unit.model.packed import slow_packed

HEADS, KV_HEADS, WIDTH = 4, 2, 16


@pytest.fixture(scope="module")
def attention(parallel):
    """The plug-in as SelfAttention builds it."""
    config = build_transformer_config(ARCHITECTURES["qwen2"], ModelConfig(), parallel.sizes, False, False)
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=parallel.pg_collection)


def _qkv(sq, sk, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sq, batch, HEADS), (sk, batch, KV_HEADS), (sk, batch, KV_HEADS))
    return [torch.randn(*s, WIDTH, generator=generator, requires_grad=True) for s in shapes]


def _naive(q, k, v, hidden):
    """[sq, b, heads, d] with the scores written out; `hidden` [b, 1, sq, sk] is True where nothing is seen."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) / math.sqrt(WIDTH)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)


def _causal(sq, sk, batch=1):
    return torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1).expand(batch, 1, sq, sk)


@pytest.mark.parametrize(("sq", "sk"), [(9, 9), (1, 9), (4, 9)], ids=["whole", "one new token", "new tokens"])
def test_plain_batch_and_cache(attention, sq, sk):
    """With a cache, torch's is_causal aligns the mask to the first key: new tokens saw only the oldest ones."""
    q, k, v = _qkv(sq, sk, 3)
    out = attention(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    expected = _naive(q, k, v, _causal(sq, sk, 3))
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sq", [1, 4, 9])
def test_mask_of_lengths(attention, sq):
    """Prompts of different lengths share a batch: hidden keys (Megatron: True = hidden) must not be seen."""
    q, k, v = _qkv(sq, 9, 3)
    hidden = _causal(sq, 9, 3).clone()
    for row, start in enumerate((0, 2, 5)):
        hidden[row, :, :, :start] = True
    seen = (~hidden).any(-1)[:, 0].T
    ours, expected = attention(q, k, v, hidden), _naive(q, k, v, hidden)
    torch.testing.assert_close(ours[seen], expected[seen])
    assert ours.isfinite().all(), "padding rows see nothing; NaN there would spread through the cache"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_packed_equals_one_by_one(attention, lengths):
    """A packed token that attends across a boundary leaks the previous sample."""
    q, k, v = (t[:, 0] for t in _qkv(sum(lengths), sum(lengths), 1))
    out = attention(q, k, v, None, packed_seq_params=packed_params(tuple(lengths), torch.device("cpu")))
    at = 0
    for n in lengths:
        alone = _naive(*(t[at : at + n].unsqueeze(1) for t in (q, k, v)), _causal(n, n))
        torch.testing.assert_close(out[at : at + n].flatten(1), alone[:, 0])
        at += n


def test_no_path_repeats_keys_or_writes_scores(attention):
    """At 4096 tokens the stock attention held 1 GB of scores; here no tensor is larger than the inputs."""
    n = 256
    q, k, v = _qkv(n, n, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention(q, k, v, None)
    largest = max(abs(e.cpu_memory_usage) for e in profile.events())
    assert largest < n * n * 4


def test_unfit_windows_are_refused(attention):
    """A window longer than its last boundary left its tail without attention."""
    q, k, v = (t[:, 0] for t in _qkv(10, 10, 1))
    with pytest.raises(ValueError, match="10 tokens but cu_seqlens ends at 8"):
        attention(q, k, v, None, packed_seq_params=packed_params((3, 5), torch.device("cpu")))
    with pytest.raises(ValueError, match=r"multiple of 4; found lengths \[6\]"):
        packed_layout(packed_params((6, 8), torch.device("cpu")).__class__(cu_seqlens_q=torch.tensor([0, 6, 14])), 2)


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_context_parallel_partition(cp, units):
    """The shares cover every token once, and the order puts gathered shares back."""
    lengths = tuple(2 * cp * n for n in units)
    shares = [context_parallel_share(lengths, cp, r) for r in range(cp)]
    gathered = torch.cat(shares)
    assert sorted(gathered.tolist()) == list(range(sum(lengths)))
    assert len({len(s) for s in shares}) == 1
    if cp > 1:
        assert torch.equal(gathered[_token_order(lengths, cp)], torch.arange(sum(lengths)))
        # Transformer Engine's rule: first sequence, rank 0 holds the first and the last of 2 x CP chunks.
        chunk = lengths[0] // (2 * cp)
        first = shares[0][: 2 * chunk].tolist()
        assert first == [*range(chunk), *range(lengths[0] - chunk, lengths[0])]


@pytest.mark.parametrize("prefixes", [None, (-1, 0, 0, -1, 3)], ids=["alone", "with beginnings"])
def test_a_window_in_one_call(attention, prefixes):
    """As on a GPU: keys of a sequence's beginning left out, or in the wrong order, or those of another."""
    lengths = (7, 4, 1, 12, 8)
    params = packed_params(lengths, torch.device("cpu"))
    if prefixes is not None:
        del params._ra3_layout
        set_prefixes(params, prefixes)
    q, k, v = (t[:, 0] for t in _qkv(sum(lengths), sum(lengths), 1))
    expected = attention(q, k, v, None, packed_seq_params=params)
    found = all_sequences(q, k, v, packed_layout(params, 1), None, slow_packed)
    torch.testing.assert_close(found.flatten(1), expected.flatten(1))
