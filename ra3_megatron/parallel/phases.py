"""Phases of a step: what the time between two marks was spent on, told to whoever listens.

Without a listener a phase is a range in torch's profiler and costs microseconds; so they stand around parts of a step,
never inside a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.profiler import record_function

RANGE = "ra3: "
"""Beginning of the ranges' names in a profiler's trace."""


class Listener(Protocol):
    """Somebody who measures."""

    def begin(self, name: str) -> None:
        """A phase begins, inside those that have begun and not ended."""

    def end(self) -> None:
        """The innermost phase ends."""


_listeners: list[Listener] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block is `name`: `data`, `rollout`, `judge`, `score`, `update` and its parts, `save`."""
    with record_function(RANGE + name):
        for listener in _listeners:
            listener.begin(name)
        try:
            yield
        finally:
            for listener in reversed(_listeners):
                listener.end()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Phases of this process are told to `listener` inside the block, which must be outside of any phase."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
