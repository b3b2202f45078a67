"""Phases of a step, as a listener and torch's profiler hear of them."""

import pytest
from torch.profiler import ProfilerActivity, profile

from ra3_megatron.parallel.phases import RANGE, listening, phase


class Told:
    def __init__(self) -> None:
        self.said: list[str] = []

    def begin(self, name: str) -> None:
        self.said.append(f"<{name}")

    def end(self) -> None:
        self.said.append(">")


def test_listener_hears_beginnings_and_ends_in_order() -> None:
    """A phase that raised was never ended, and the time of all later ones was counted inside it."""
    told = Told()
    with phase("before"), listening(told):
        with phase("update"), phase("optimizer"):
            pass
        with pytest.raises(ValueError, match="bad"), phase("save"):
            raise ValueError("bad")
    with phase("after"):
        pass
    # The one it was not there for at the beginning does not end for it either.
    assert told.said == ["<update", "<optimizer", ">", ">", "<save", ">"]


def test_a_profilers_trace_has_the_ranges() -> None:
    """Kernels of a trace could not be told apart by what they were for."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, phase("update"):
        pass
    assert f"{RANGE}update" in {event.name for event in profiler.events()}
