"""Layouts give one rank's logits and losses; collectives name who is missing. Real processes over gloo."""

import re
import time

import pytest

from ra3_megatron.parallel.collectives import EXIT_STUCK
from tests.distributed.launch import run_ranks, start_and_wait

RANKS = "tests.distributed.parallel_ranks"


def _case(name, arch="qwen2", model=None, **parallel):
    return {"name": name, "arch": arch, "parallel": parallel, "model": model or {}}


TWO = [
    _case("data 2"),
    _case("tensor 2", tensor=2),
    _case("tensor 2 + sequence", tensor=2, sequence=True),
    _case("pipeline 2", pipeline=2),
    _case("context 2", context=2),
    _case("recompute full", model={"recompute": "full"}),
    _case("recompute selective", model={"recompute": "selective"}, tensor=2),
    _case("qwen3 data 2", "qwen3"),
    _case("qwen3 tensor 2 + sequence", "qwen3", tensor=2, sequence=True),
    _case("qwen3 context 2", "qwen3", context=2),
    _case("llama3 data 2", "llama3"),
    _case("llama3 pipeline 2 x virtual 2", "llama3", pipeline=2, virtual_pipeline=2),
]
FOUR = [
    _case("data 4"),
    _case("tensor 2 x pipeline 2 + sequence", tensor=2, pipeline=2, sequence=True),
    _case("tensor 2 x context 2 + sequence", tensor=2, context=2, sequence=True),
    _case("context 4", context=4),
]


def _compare(results, cases):
    references = {}
    for case in cases:
        found = [r[case["name"]] for r in results]
        reference = references.setdefault(case["arch"], found)
        losses = [f["losses"] for f in found if f["losses"]]
        assert losses, case
        for got in losses:
            assert got == pytest.approx(reference[0]["losses"], rel=2e-5), case["name"]
        for f in found:
            assert f["norms"] == pytest.approx(reference[0]["norms"], rel=2e-4), case["name"]
            assert f["logits_gap"] is None or f["logits_gap"] <= 1e-5, case["name"]
    assert references["qwen2"][0]["losses"][-1] < references["qwen2"][0]["losses"][0], "training must lower the loss"


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_layouts_equal_one_rank(tmp_path, world, cases):
    """Loss or gradient changed with CP, TP or PP: wrong cp_group, unreduced norm gradients, shifted rope."""
    _compare(run_ranks(f"{RANKS}:layouts", world, {"cases": cases}, 240, tmp_path), cases)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Four ranks, tensor-parallel in pairs; rank 1 is late twice and then stays away."""
    return run_ranks(f"{RANKS}:exchange_late_missing", 4, {"absent": 1}, 120, tmp_path_factory.mktemp("exchange"))


def test_exchange_on_explicit_groups(exchanged):
    """A collective over WORLD where a tensor-parallel group was meant gave plausible numbers."""
    for rank, got in enumerate(exchanged):
        assert got["sum"] == 10
        assert got["tp_sum"] == (1.0 if rank < 2 else 5.0)
        assert got["max"] == [3, 0]
        assert got["object"] == {"from": 1 if rank < 2 else 3}
        assert got["gathered"] == [[0], [1], [2], [3]]
        assert got["data_rank"] == rank // 2


def test_late_is_not_missing(exchanged):
    """Waits are cut into slices of a second; a rank 2.5 s late must still be waited for."""
    assert [got["late_sum"] for got in exchanged] == [4] * 4


def test_missing_rank_is_named(exchanged):
    """A rank that never came left the others waiting for the default half hour with no word."""
    for rank in (0, 2, 3):
        for call, where in (("missing barrier", "save step 40"), ("missing sum", "count tokens")):
            text, missing, seconds = exchanged[rank][call]
            assert missing == [1]
            # The deadline is 1.5 s; a busy machine may notice later, but long before the group's own minute.
            said = rf'rank 1 did not arrive at "{where}" within \d+\.\d s; last seen at "train step 39"'
            assert re.search(said, text), text
            assert 1.5 <= seconds < 30


def test_a_failed_and_a_dead_rank_are_named(tmp_path):
    """One rank's exception ended in timeouts on the others; gloo's "connection closed by peer" names nobody."""
    survivor, culprit = start_and_wait(f"{RANKS}:fail_then_die", 2, {"culprit": 1}, 120, tmp_path)
    assert '{"fail": "ValueError: shard 3 is torn"}' in culprit.log
    assert survivor.value, survivor.log
    assert survivor.value["fail"].startswith('PeerFailed: rank 1 failed in "end of read shard"')
    assert "ValueError: shard 3 is torn" in survivor.value["fail"]
    assert survivor.value["die"].startswith("CollectiveTimeout")
    assert "rank 1" in survivor.value["die"]
    assert "train step 2" in survivor.value["die"]


def test_a_stuck_process_ends_itself(tmp_path):
    """A process in a native call that never returns kept its nodes for days."""
    [stuck] = start_and_wait(f"{RANKS}:stuck_phase", 1, {}, 60, tmp_path)
    assert stuck.code == EXIT_STUCK
    assert 'stuck in "read corpus"' in stuck.log
    assert "stuck_phase" in stuck.log, "the stack must be in the log"


def test_launcher_shows_the_traceback_and_kills_late_ranks(tmp_path):
    """A hanging rank left twelve orphans behind and its test said nothing but `assert False`."""
    with pytest.raises(AssertionError, match=r"rank 0: exit code 1(.|\n)*no_such_function"):
        run_ranks("tests.distributed.launch:no_such_function", 1, {}, 60, tmp_path)
    start = time.monotonic()
    results = start_and_wait("time:sleep", 1, {}, 60, tmp_path)
    assert results[0].code == 1
    assert "TypeError" in results[0].error
    late = start_and_wait("tests.distributed.launch:hang", 2, {"seconds": 60}, 2, tmp_path)
    assert [r.code for r in late] == [None, None]
    assert time.monotonic() - start < 30
