"""TrainState and the hash of parameters."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.checkpoint.hashing import ParameterSums
from ra3_megatron.checkpoint.state import TrainState, refuse_other_architecture
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError

counters = st.integers(0, 2**62)
plain = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-(2**60), 2**60), st.text(max_size=5)), max_size=3)


@given(counters, counters, counters, counters, plain, plain)
def test_state_round_trip(step: int, rounds: int, tokens: int, samples: int, data: dict, schedule: dict) -> None:
    """Counters swapped or cut on their way through JSON resume a run at the wrong place."""
    state = TrainState("rlvr", step, rounds, 3, tokens, samples, 1, data, schedule, "ab", {"tensor": 2})
    assert TrainState.from_json(state.to_json()) == state


def test_state_is_strict() -> None:
    """A state of another version was read with its unknown fields dropped."""
    good = json.loads(TrainState("sft", step=3).to_json())
    for change, needle in [
        ({"iteration": 3}, "unknown fields ['iteration']"),
        ({"step": "3"}, "field 'step' is '3'"),
        ({"step": True}, "field 'step' is True"),
        ({"tokens": -1}, "counter 'tokens' is -1"),
        ({"data": []}, "field 'data' is []"),
    ]:
        with pytest.raises(UserError) as caught:
            TrainState.from_json(json.dumps(good | change))
        assert needle in str(caught.value)
    del good["em_round"]
    with pytest.raises(UserError, match="missing fields \\['em_round'\\]"):
        TrainState.from_json(json.dumps(good))
    for text in ("", "{", "[1]", "nul"):
        with pytest.raises(UserError, match=r"x\.json"):
            TrainState.from_json(text, "x.json")


def test_other_data_and_model_are_refused_by_name() -> None:
    """Resuming on another data set or model went through and trained something nobody asked for."""
    state = TrainState("sft", data={"fingerprint": "aaaa"})
    state.refuse_other_data("aaaa", "here")
    with pytest.raises(UserError, match=r"here.*aaaa.*bbbb"):
        state.refuse_other_data("bbbb", "here")
    small = Architecture()
    refuse_other_architecture(small, small, "here")
    with pytest.raises(UserError, match="num_layers: checkpoint 8, run 4"):
        refuse_other_architecture(replace(small, num_layers=8), small, "here")


def whole(key: str, x: torch.Tensor, limit: int | None = None) -> str:
    sums = ParameterSums()
    sums.add(key, x, (0,) * x.dim(), tuple(x.shape), limit)
    return sums.hexdigest()


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9)),
    st.lists(st.integers(0, 2), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 1000),
)
def test_hash_does_not_depend_on_the_split(shape: tuple, axes: list, dtype: torch.dtype, seed: int) -> None:
    """The hash must not change with TP (columns or rows), PP (layers) or the order in which shards come."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    shards = [(x, (0, 0, 0))]
    for axis in axes:
        finer = []
        for part, offset in shards:
            half = part.shape[axis] // 2
            for piece, start in (
                (part.narrow(axis, 0, half), 0),
                (part.narrow(axis, half, part.shape[axis] - half), half),
            ):
                moved = tuple(o + (start if i == axis else 0) for i, o in enumerate(offset))
                finer.append((piece, moved))
        shards = finer
    sums = ParameterSums()
    for part, offset in reversed(shards):
        other = ParameterSums()
        other.add("w", part, offset, shape)
        sums.merge(other)
    assert sums.hexdigest() == whole("w", x)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 23), st.integers(0, 31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_hash_sees_every_bit(position: int, bit: int, dtype: torch.dtype) -> None:
    """One flipped bit anywhere, the sign included, changes the hash."""
    x = torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype)
    y = x.clone()
    view = y.view(torch.int32 if dtype == torch.float32 else torch.int16).view(-1)
    bits = 8 * x.element_size()
    mask = 1 << (bit % bits)
    view[position] ^= mask - (1 << bits) if mask >> (bits - 1) else mask
    assert whole("w", x) != whole("w", y)


def test_hash_sees_order_names_and_types() -> None:
    """Swapped rows, columns, layers or tensors leave every plain sum unchanged; the hash must see them."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    seen = {whole("w", x), whole("v", x), whole("w", x.bfloat16()), whole("w", x.reshape(3, 5, 4))}
    seen |= {whole("w", x.flip(axis)) for axis in range(3)} | {whole("w", x.roll(1))}
    assert len(seen) == 8


def test_hash_leaves_vocabulary_padding_out() -> None:
    """Padding differs between tensor-parallel sizes; a hash that saw it could not be compared across layouts."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.full((5, 3), 9.0)])
    assert whole("w", padded, 7) == whole("w", x)
    assert whole("w", padded, 8) != whole("w", x)
    sums = ParameterSums()
    for start in (0, 6):
        sums.add("w", padded[start : start + 6], (start, 0), (12, 3), 7)
    assert sums.hexdigest() == whole("w", x)
