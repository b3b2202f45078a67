"""Plain data as bytes between the two sides: nothing is ever executed or unpickled to read it.

A value is one tag byte and its content, little endian: N T F (None, True, False), q (int, 8 bytes), i (int, length and
two's complement), d (float, its 8 bytes, so NaN and -0.0 survive), c (complex), s (str, UTF-8 with lone surrogates),
b (bytes), l t e z (list, tuple, set, frozenset: count and items), m (dict: count and pairs), r (range), y (a builtin
type by name), g (an iterator, listed), v (another iterable, listed, and its handle), h (a handle: an object that stays
where it is). A frame is the length in 4 bytes and one value.
"""

import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

MAX_DEPTH = 64
"""Nesting that is sent; a cycle ends here too."""
HASH_SECONDS = 2.0
"""Processor seconds that one frame's sets and dicts may take, since keys can be chosen to collide."""

_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_C128 = struct.Struct("<dd")
_SMALL = 1 << 63


_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, type(None), type)
}


class WireError(ValueError):
    """The bytes are no value."""


class TooLarge(WireError):
    """The value is larger or deeper than allowed."""


class Unsendable(WireError):
    """The value is no plain data."""


class Listed:
    """What is left of an iterable that is no plain data (deque, view of a dict): its items; equal to nothing else."""

    def __init__(self, items: list[Any], handle: Any) -> None:
        self.items = items
        self.handle = handle

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]


class Encoder:
    """Writes one value; subclasses are written as their plain base, read with the base's own methods."""

    def __init__(self, limit: int, handle: Callable[[Any], int] | None = None) -> None:
        self.out = bytearray(4)
        self._limit = limit
        self._handle = handle

    def frame(self, value: Any) -> bytes:
        """The frame of `value`.

        Raises:
            TooLarge: more bytes than the limit, or deeper than `MAX_DEPTH`.
            Unsendable: something in it is no plain data, and there is no place for handles.
        """
        self._put(value, 0)
        self._room()
        self.out[:4] = _U32.pack(len(self.out) - 4)
        return bytes(self.out)

    def _room(self) -> None:
        if len(self.out) > self._limit:
            raise TooLarge(f"larger than {self._limit} bytes")

    def _put(self, value: Any, depth: int) -> None:
        out = self.out
        if value is None:
            out += b"N"
        elif value is True:
            out += b"T"
        elif value is False:
            out += b"F"
        elif isinstance(value, int):
            number = int.__index__(value)
            if -_SMALL <= number < _SMALL:
                out += b"q" + _I64.pack(number)
            else:
                self._bytes(b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True))
        elif isinstance(value, str):
            self._bytes(b"s", str.__str__(value).encode("utf-8", "surrogatepass"))
        elif isinstance(value, float):
            out += b"d" + _F64.pack(float.__float__(value))
        elif isinstance(value, list):
            self._items(b"l", list.__iter__(value), list.__len__(value), depth)
        elif isinstance(value, tuple):
            self._items(b"t", tuple.__iter__(value), tuple.__len__(value), depth)
        elif isinstance(value, dict):
            self._dict(value, depth)
        else:
            self._put_rarer(value, depth)
        if len(out) > self._limit:
            raise TooLarge(f"larger than {self._limit} bytes")

    def _put_rarer(self, value: Any, depth: int) -> None:
        if isinstance(value, set):
            self._items(b"e", set.__iter__(value), set.__len__(value), depth)
        elif isinstance(value, frozenset):
            self._items(b"z", frozenset.__iter__(value), frozenset.__len__(value), depth)
        elif isinstance(value, complex):
            number = complex.__complex__(value)
            self.out += b"c" + _C128.pack(number.real, number.imag)
        elif isinstance(value, bytes):
            self._bytes(b"b", bytes.__getitem__(value, slice(None)))
        elif isinstance(value, bytearray):
            self._bytes(b"b", bytes(value))
        elif isinstance(value, range):
            self.out += b"r"
            for number in (value.start, value.stop, value.step):
                self._put(int(number), depth + 1)
        elif type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            self._put(value.item(), depth + 1)
        elif isinstance(value, type) and _TYPES.get(value.__name__) is value:
            self._bytes(b"y", value.__name__.encode())
        elif self._handle is None:
            raise Unsendable(f"an object of type {type(value).__name__} is no plain data")
        elif isinstance(value, Iterator):
            self._listed(b"g", value, depth)
        elif isinstance(value, (deque, _KEYS, _VALUES, _ITEMS)):
            self._listed(b"v", iter(value), depth)
            self.out += _U32.pack(self._handle(value))
        else:
            self.out += b"h" + _U32.pack(self._handle(value))

    def _bytes(self, tag: bytes, content: bytes) -> None:
        if len(self.out) + len(content) > self._limit:
            raise TooLarge(f"larger than {self._limit} bytes")
        self.out += tag + _U32.pack(len(content)) + content

    def _items(self, tag: bytes, items: Iterator[Any], count: int, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise TooLarge(f"deeper than {MAX_DEPTH} levels")
        self.out += tag + _U32.pack(count)
        for item in items:
            self._put(item, depth + 1)

    def _listed(self, tag: bytes, items: Iterator[Any], depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise TooLarge(f"deeper than {MAX_DEPTH} levels")
        self.out += tag
        at = len(self.out)
        self.out += b"\0\0\0\0"
        count = 0
        for count, item in enumerate(items, 1):  # noqa: B007 - the last count is what is wanted
            self._put(item, depth + 1)
        self.out[at : at + 4] = _U32.pack(count)

    def _dict(self, value: dict[Any, Any], depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise TooLarge(f"deeper than {MAX_DEPTH} levels")
        self.out += b"m" + _U32.pack(dict.__len__(value))
        for key, item in dict.items(value):
            self._put(key, depth + 1)
            self._put(item, depth + 1)


_EMPTY: dict[int, int] = {}
_KEYS, _VALUES, _ITEMS = type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items())


class Decoder:
    """Reads one value strictly: known tags, true counts, bounded depth, nothing left over."""

    def __init__(self, content: bytes, handle: Callable[[int], Any] | None = None) -> None:
        self._in = content
        self._at = 0
        self._handle = handle
        self._hashed = 0
        self._until = 0.0

    def value(self) -> Any:
        """The value.

        Raises:
            WireError: the content is no value, or takes too long to become one.
        """
        value = self._get(0)
        if self._at != len(self._in):
            raise WireError("bytes are left over")
        return value

    def _take(self, count: int) -> bytes:
        at = self._at
        self._at = end = at + count
        if end > len(self._in):
            raise WireError("cut short")
        return self._in[at:end]

    def _count(self) -> int:
        count: int = _U32.unpack(self._take(4))[0]
        if count > len(self._in) - self._at:
            raise WireError("a count beyond the end")
        return count

    def _get(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise WireError(f"deeper than {MAX_DEPTH} levels")
        tag = self._take(1)
        if tag == b"q":
            return _I64.unpack(self._take(8))[0]
        if tag == b"s":
            try:
                return self._take(self._count()).decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise WireError("a str that is not UTF-8") from error
        if tag == b"l":
            return [self._get(depth + 1) for _ in range(self._count())]
        if tag == b"t":
            return tuple([self._get(depth + 1) for _ in range(self._count())])
        if tag == b"d":
            return _F64.unpack(self._take(8))[0]
        if tag == b"T":
            return True
        if tag == b"F":
            return False
        if tag == b"N":
            return None
        return self._get_rarer(tag, depth)

    def _get_rarer(self, tag: bytes, depth: int) -> Any:
        if tag == b"m":
            return self._dict(depth)
        if tag == b"e":
            return self._set(depth)
        if tag == b"z":
            return frozenset(self._set(depth))
        if tag == b"i":
            return int.from_bytes(self._take(self._count()), "little", signed=True)
        if tag == b"b":
            return self._take(self._count())
        if tag == b"c":
            return complex(*_C128.unpack(self._take(16)))
        if tag == b"r":
            return self._range(depth)
        if tag == b"y":
            return self._type()
        if self._handle is not None:
            if tag == b"h":
                return self._handle(_U32.unpack(self._take(4))[0])
            if tag == b"g":
                return iter([self._get(depth + 1) for _ in range(self._count())])
            if tag == b"v":
                items = [self._get(depth + 1) for _ in range(self._count())]
                return Listed(items, self._handle(_U32.unpack(self._take(4))[0]))
        raise WireError(f"unknown tag {tag!r}")

    def _type(self) -> type:
        name = self._take(self._count()).decode("ascii", "replace")
        if name not in _TYPES:
            raise WireError("an unknown type")
        return _TYPES[name]

    def _range(self, depth: int) -> range:
        numbers = [self._get(depth + 1) for _ in range(3)]
        if not all(type(number) is int for number in numbers) or numbers[2] == 0:
            raise WireError("a range that is none")
        return range(*numbers)

    def _hash_time(self) -> None:
        if self._hashed % 256 == 0:
            now = time.process_time()
            self._until = self._until or now + HASH_SECONDS
            if now > self._until:
                raise TooLarge("sets or dicts whose keys collide")
        self._hashed += 1

    def _set(self, depth: int) -> set[Any]:
        items: set[Any] = set()
        count = self._count()
        try:
            for _ in range(count):
                self._hash_time()
                items.add(self._get(depth + 1))
        except TypeError as error:
            raise WireError("an item of a set that cannot be hashed") from error
        if len(items) != count:
            raise WireError("a set with equal items")
        return items

    def _dict(self, depth: int) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        count = self._count()
        try:
            for _ in range(count):
                self._hash_time()
                key = self._get(depth + 1)
                items[key] = self._get(depth + 1)
        except TypeError as error:
            raise WireError("a key of a dict that cannot be hashed") from error
        if len(items) != count:
            raise WireError("a dict with equal keys")
        return items


def dumps(value: Any, limit: int = 1 << 31) -> bytes:
    """The frame of plain data without handles."""
    return Encoder(limit).frame(value)


def loads(content: bytes) -> Any:
    """The value of a frame's content (without its length), without handles."""
    return Decoder(content).value()
