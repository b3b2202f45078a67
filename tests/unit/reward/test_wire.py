"""Plain data between the two sides: true copies, and nothing but plain data whatever the bytes are."""

import contextlib
import enum
import math
from collections import Counter, OrderedDict, deque, namedtuple
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.reward.guest import compare
from ra3_megatron.reward.guest.wire import (
    MAX_DEPTH,
    Decoder,
    Encoder,
    Listed,
    TooLarge,
    Unsendable,
    WireError,
    dumps,
    loads,
)

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 200), max_value=1 << 200)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(alphabet=st.characters())
    | st.binary()
    | st.sampled_from([int, str, range(3), range(9, -2, -3)])
)
HASHABLE = st.recursive(ATOMS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=6)
VALUES = st.recursive(
    ATOMS | st.sets(HASHABLE, max_size=4),
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(HASHABLE, inner, max_size=4),
    max_leaves=20,
)


def there_and_back(value: Any) -> Any:
    return loads(dumps(value)[4:])


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_values_come_back_equal_and_of_the_same_types(value: Any) -> None:
    """A tuple came back as a list, True as 1, and a right answer was judged wrong."""
    assert compare.equal(there_and_back(value), value)


def test_floats_come_back_bit_for_bit() -> None:
    """-0.0 lost its sign and NaN became None on the way."""
    assert math.copysign(1, there_and_back(-0.0)) == -1
    assert math.isnan(there_and_back(math.nan))
    assert there_and_back([math.inf, 5e-324, 0.1]) == [math.inf, 5e-324, 0.1]
    assert there_and_back("\ud800 a") == "\ud800 a"


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_a_value_or_a_wire_error(content: bytes) -> None:
    """A forged frame raised something that the referee did not expect, and the sandbox died."""
    with contextlib.suppress(WireError):
        Decoder(content, handle=lambda number: number).value()


@given(VALUES, st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_frames_are_a_value_or_a_wire_error(value: Any, data: st.DataObject) -> None:
    """Bytes near valid ones reach deeper into the decoder than random ones do."""
    content = bytearray(dumps(value)[4:])
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        Decoder(bytes(content), handle=lambda number: number).value()


class Liar(int):
    """Claims to equal everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __index__(self) -> int:
        return 42


class Texts(str):
    def encode(self, *_: object, **__: object) -> bytes:  # type: ignore[override]
        return b"forged"


class Longer(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([1, 2, 3])

    def __len__(self) -> int:
        return 3


class Colour(enum.IntEnum):
    RED = 7


def test_subclasses_are_flattened_by_their_bases_own_methods() -> None:
    """An int whose __eq__ is always true was paid by every evaluator that compares in one process."""
    point = namedtuple("point", "x y")(1, 2)
    for value, plain in (
        (Liar(3), 3),
        (Texts("true"), "true"),
        (Longer([5]), [5]),
        (Colour.RED, 7),
        (point, (1, 2)),
        (OrderedDict(a=1), {"a": 1}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (bytearray(b"x"), b"x"),
    ):
        answer = there_and_back(value)
        assert type(answer) is type(plain)
        assert compare.equal(answer, plain)


def test_cycles_depth_and_size_are_refused_early() -> None:
    """A list that holds itself, or a million levels, took the encoder's stack."""
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(TooLarge):
        dumps(cycle)
    deep: Any = 0
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(TooLarge):
        dumps(deep)
    shared: Any = [0]
    for _ in range(50):
        shared = [shared, shared]  # 2^50 items in 51 lists
    with pytest.raises(TooLarge):
        dumps(shared, limit=1 << 16)
    with pytest.raises(TooLarge):
        dumps("x" * 100, limit=50)
    with pytest.raises(WireError):
        loads(b"l\x01\0\0\0" * 200 + b"N")


def test_counts_beyond_the_end_do_not_take_memory() -> None:
    """A list of 2^32 items was announced in five bytes."""
    for tag in b"ltezmsbi":
        with pytest.raises(WireError):
            loads(bytes([tag]) + b"\xff\xff\xff\xff")


def test_endless_iterators_end_at_the_limit() -> None:
    """itertools.count() as an answer ran until the processor limit."""
    import itertools

    with pytest.raises(TooLarge):
        Encoder(1 << 12, handle=lambda _: 0).frame(itertools.count())


def test_colliding_keys_are_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of numbers with one hash took the trusted side minutes."""
    from ra3_megatron.reward.guest import wire

    monkeypatch.setattr(wire, "HASH_SECONDS", 0.05)
    frame = dumps([i * ((1 << 61) - 1) for i in range(20000)])
    with pytest.raises(TooLarge):
        loads(b"e" + frame[5:])


def test_iterators_stay_iterators_and_other_iterables_equal_nothing() -> None:
    """A deque was taken for the list with the same items."""
    content = Encoder(1 << 12, handle=lambda _: 3).frame((iter([1, 2]), deque([1, 2]), object()))[4:]
    iterator, listed, thing = Decoder(content, handle=lambda number: f"object {number}").value()
    assert next(iterator) == 1
    assert list(iterator) == [2]
    assert isinstance(listed, Listed)
    assert list(listed) == [1, 2]
    assert listed != [1, 2]
    assert (len(listed), listed[1], listed.handle) == (2, 2, "object 3")
    assert thing == "object 3"


def test_what_is_no_plain_data_is_refused_without_handles() -> None:
    """A lambda among the arguments was silently replaced by None."""
    for value in (lambda: 0, object(), iter([]), math):
        with pytest.raises(Unsendable):
            dumps(value)
    with pytest.raises(WireError):
        loads(b"h\0\0\0\0")
