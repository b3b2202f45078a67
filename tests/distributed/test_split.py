"""A world in two sides of which one fails: the other says why, and both end."""

from pathlib import Path

from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.parallel.collectives import wait_for_all
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.parallel.split import split
from tests.distributed.launch import start_and_wait


def fails() -> None:
    with initialize(ParallelConfig(timeout_s=60)) as whole, split(whole, 1, 60) as side:
        if not side.trains:
            raise ValueError("no answers today")
        wait_for_all(side.both, 0, "answers of step 7", 60)


def test_a_side_that_fails_is_named(tmp_path: Path) -> None:
    """The other side learned of it at its deadline, or hung at its exit in the collective that never came."""
    first, second = start_and_wait("tests.distributed.test_split:fails", 2, None, 90, tmp_path)
    assert (first.code, second.code) == (1, 1)
    assert "PeerFailed: rank 1" in first.error
    assert "no answers today" in first.error
    assert "ValueError: no answers today" in second.error
