"""Leaving on request: who asks, in which order of weight, how often the ranks talk, what the heartbeat says."""

import json
import os
import signal
import time

import pytest

from ra3_megatron.config import control
from ra3_megatron.config.errors import UserError
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.stages import interrupt, stragglers
from ra3_megatron.stages.interrupt import Interrupt


@pytest.fixture(scope="module")
def parallel():
    with initialize() as made:
        yield made


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder and an attempt's, nobody having asked for anything."""
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    monkeypatch.setenv(control.ATTEMPT_DIR, str(attempt))
    monkeypatch.delenv(control.MUST_SAVE_BY, raising=False)
    interrupt._signalled.clear()
    yield tmp_path
    interrupt._signalled.clear()


def asked(parallel, run, step=1):
    return Interrupt(parallel, run, 10.0).requested(step)


def test_nobody_asked(parallel, run):
    """A run left at its first step for no reason."""
    assert asked(parallel, run) is None


def test_every_way_to_ask(parallel, run, monkeypatch):
    """A wish was overlooked, or the stop file counted as a wish to go on: a stopped run was requeued for ever."""
    interrupt.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    by_signal = asked(parallel, run)
    assert (by_signal.code, "SIGUSR1" in by_signal.reason) == (85, True)
    (run / "attempt" / control.REQUEST_FILE).write_text("time limit")
    by_job = asked(parallel, run)
    assert (by_job.code, "the job asked" in by_job.reason) == (85, True)
    monkeypatch.setenv(control.MUST_SAVE_BY, str(time.time() - 1))
    by_clock = asked(parallel, run)
    assert (by_clock.code, control.MUST_SAVE_BY in by_clock.reason) == (85, True)
    (run / control.STOP_FILE).touch()
    by_user = asked(parallel, run, step=7)
    assert (by_user.code, "stop file" in by_user.reason, "step 7" in by_user.reason) == (86, True, True)


def test_a_deadline_to_come_does_not_stop(parallel, run, monkeypatch):
    """The sign of the comparison."""
    monkeypatch.setenv(control.MUST_SAVE_BY, str(time.time() + 1000))
    assert asked(parallel, run) is None


def test_nonsense_in_a_variable_is_refused(parallel, run, monkeypatch):
    """A deadline with a typing error was no deadline."""
    monkeypatch.setenv(control.MUST_SAVE_BY, "8h")
    with pytest.raises(UserError, match=control.MUST_SAVE_BY):
        Interrupt(parallel, run, 10.0)


def test_the_ranks_do_not_talk_at_every_step(parallel, run, monkeypatch):
    """One more collective per step is a price for fast steps; none for a long time would miss the signal."""
    talks = []
    real = interrupt.all_reduce_max
    monkeypatch.setattr(interrupt, "all_reduce_max", lambda *a: talks.append(1) or real(*a))
    clock = [0.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    mine = Interrupt(parallel, run, 10.0)
    mine.begin("some-stage")
    for step in range(500, 1500):
        clock[0] += 0.01
        assert mine.requested(step) is None
    # 1000 steps of 10 ms, agreed every second: ten times, and a few more while the cadence is found.
    assert 10 <= len(talks) <= 20
    (run / control.STOP_FILE).touch()
    clock[0] += 2.0
    assert any(mine.requested(step) for step in range(1500, 1601)), "seen within a hundred steps"


def test_heartbeat(parallel, run):
    """The job could not tell a long save from a hang."""
    beat = lambda: json.loads((run / "attempt" / control.HEARTBEAT_FILE).read_text())  # noqa: E731
    mine = Interrupt(parallel, run, 10.0)
    mine.begin("03-sft")
    assert (beat()["stage"], beat()["what"], beat()["allow_s"]) == ("03-sft", "setting up", 1800.0)
    mine.requested(3)
    assert (beat()["what"], beat()["step"], beat()["allow_s"]) == ("steps", 3, 70.0)
    mine.beat("save", 600.0)
    assert (beat()["what"], beat()["allow_s"]) == ("save", 600.0)
    mine.requested(4)
    assert (beat()["step"], beat()["allow_s"]) == (4, 70.0), "what was allowed for the save ends with it"


def test_slow_nodes():
    """The node of the slowest process is meant, and one machine alone has nobody to be compared with."""
    times = [("a", 1.0), ("a", 1.0), ("b", 1.1), ("b", 2.0), ("c", 0.9), ("c", 1.0)]
    assert stragglers.slow_nodes(times) == {"b": 2.0}
    assert stragglers.slow_nodes([("a", 1.0), ("a", 5.0)]) == {}
    series = stragglers.Series()
    assert [bool(series.add(slow)) for slow in ({"b": 2.0}, {"b": 1.5}, {}, {"b": 2.0}, {"b": 2.0})] == [False] * 5
    assert series.add({"b": 1.4}) == {"b": 1.4}


def test_own_speed_leaves_the_random_numbers_alone(parallel):
    """A measurement between two steps changed the run it measured."""
    import torch

    before = torch.random.get_rng_state()
    assert 0 < stragglers.own_seconds(parallel) < 10
    assert torch.equal(before, torch.random.get_rng_state())
