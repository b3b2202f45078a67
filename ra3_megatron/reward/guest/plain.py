"""Builtin functions over answers of a program, for whoever cannot be interrupted: what walks looks at the clock."""

import math
import time
from collections.abc import Callable, Iterator
from functools import cmp_to_key
from typing import Any

from .supervise import Ended

_MOST = 1 << 22
"""Items of a `range` that is listed, which takes 25 bytes to send."""
_WORD = 1 << 64
TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range)
}


class Overtime(Ended):
    """The tests have used up their processor time."""


class Clock:
    """Processor time of one test's own work."""

    def __init__(self, limit_s: float) -> None:
        self._limit = limit_s
        self._calls = 0
        self.start()

    def start(self) -> None:
        """Count from now."""
        self._until = time.process_time() + self._limit

    def look(self) -> None:
        """Called once for every item; looks now and then.

        Raises:
            Overtime: more than the limit.
        """
        self._calls += 1
        if self._calls % 256 == 0 and time.process_time() > self._until:
            raise Overtime("cpu_limit", f"the tests' own code used more than {self._limit:g} processor seconds")


def _items(clock: Clock, values: Any) -> Iterator[Any]:
    for count, item in enumerate(values):
        if count >= _MOST:
            raise MemoryError("too many items")
        clock.look()
        yield item


def contains(clock: Clock, values: Any, item: Any) -> bool:
    """`item in values`; a range is walked through for what is no int."""
    if type(values) is range and type(item) not in (int, bool):
        return any(item is one or item == one for one in _items(clock, values))
    return item in values


def _set(clock: Clock, *values: Any) -> set[Any]:
    if len(values) != 1:
        return set(*values)
    found: set[Any] = set()
    for item in _items(clock, values[0]):
        found.add(item)  # one by one: keys may collide
    return found


def _sorted(clock: Clock, *values: Any, **options: Any) -> list[Any]:
    if len(values) != 1:
        return sorted(*values, **options)

    def before(a: Any, b: Any) -> int:
        clock.look()
        return -1 if a < b else 0

    items = list(_items(clock, values[0]))
    if all(type(item) in (int, float, str) for item in items):
        return sorted(items, **options)
    return sorted(items, key=cmp_to_key(before), **options)


def _sum(clock: Clock, *values: Any) -> Any:
    if len(values) != 1:
        return sum(*values)
    items = list(_items(clock, values[0]))
    if all(type(i) in (bool, float) or (type(i) is int and -_WORD < i < _WORD) for i in items):
        return sum(items)
    total: Any = 0
    for item in items:
        clock.look()
        total = total + item
    return total


def _quick(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what takes as long as its arguments are large."""
    return lambda _, *args, **options: function(*args, **options)


def _walking(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what walks through one iterable, or takes items one by one."""

    def run(clock: Clock, *args: Any) -> Any:
        return function(_items(clock, args[0])) if len(args) == 1 else function(*args)

    return run


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    **{f.__name__: (_quick(f), ()) for f in (abs, len, bool, int, float, str, isinstance)},
    "round": (_quick(round), ("ndigits",)),
    "range": (_quick(range), ()),
    "math.isclose": (_quick(math.isclose), ("rel_tol", "abs_tol")),
    "set": (_set, ()),
    "sorted": (_sorted, ("reverse",)),
    "sum": (_sum, ()),
    **{f.__name__: (_walking(f), ()) for f in (list, tuple, all, any, min, max)},
}
"""By name: the function, which takes a clock first, and the keywords that it may be given."""
