"""The ledger gives back what was written, whatever a crash leaves of the file."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.rollout.ledger import Draw, Entry, RolloutKey, RolloutLedger
from ra3_megatron.rollout.rationales import rationale_record, write_rationales
from tests.unit.rollout.made import made_rollout, texts_and_tokens

MEMBERS = 2


def entries(step: int, seed: int = 0) -> list[Entry]:
    trajectories, think_tokens = texts_and_tokens()
    return [
        Entry(
            RolloutKey(1, step, slot, member),
            slot,
            made_rollout(t, think_tokens, seed + step, slot, member, step - 1),
        )
        for slot, t in enumerate(trajectories)
        for member in range(MEMBERS)
    ]


def write(folder, steps, name="0-of-1", uses="a"):
    """One draw per step; returns the size of the file after each."""
    sizes = [0]
    with RolloutLedger(folder, name, uses) as ledger:
        for step in steps:
            found = entries(step)
            ledger.append(found)
            ledger.commit(Draw(1, step, step - 1, len(found), forward_passes=3, tokens=100 + step))
            sizes.append(ledger.path.stat().st_size)
    return ledger.path, sizes


def assert_same(found, expected) -> None:
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "trajectory":
            assert (a.segments, a.decisions, a.name, a.prefix) == (b.segments, b.decisions, b.name, b.prefix)
            np.testing.assert_array_equal(a.ids, b.ids)
            assert a.ids.dtype == b.ids.dtype
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_rollout_comes_back_to_the_bit(seed, tmp_path_factory) -> None:
    """NaN, empty arrays, thoughts next to one another, decisions that were not offered."""
    folder = tmp_path_factory.mktemp("ledger")
    trajectories, _ = texts_and_tokens()
    found = entries(1, seed)
    with RolloutLedger(folder, "0-of-1", "a") as ledger:
        ledger.append(found)
        ledger.commit(Draw(1, 1, 0, len(found)))
    with RolloutLedger(folder, "0-of-1", "a") as ledger:
        assert len(ledger) == len(found)
        for entry in found:
            assert ledger.snippet(entry.key) == entry.snippet
            assert ledger.weights_version(entry.key) == 0
            assert_same(ledger.read(entry.key, trajectories[entry.snippet]), entry.rollout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path, sizes = write(tmp_path_factory.mktemp("whole"), (1, 2, 3))
    return path.read_bytes(), sizes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), extra=st.binary(max_size=40))
def test_any_cut_loses_only_what_lies_behind_it(share, extra, whole, tmp_path_factory) -> None:
    """A crash tore the last write, or the file system left other bytes at the end."""
    content, sizes = whole
    cut = round(share * len(content))
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "0-of-1.rollouts"
    path.write_bytes(content[:cut] + extra)
    complete = max(i for i, size in enumerate(sizes) if size <= cut)
    trajectories, _ = texts_and_tokens()
    with RolloutLedger(folder, "0-of-1", "a") as ledger:
        assert len(ledger) == complete * len(entries(1))
        assert path.read_bytes() == content[: sizes[complete]]
        for step in range(1, complete + 1):
            assert ledger.draw(1, step).tokens == 100 + step
            for entry in entries(step):
                assert_same(ledger.read(entry.key, trajectories[entry.snippet]), entry.rollout)
        assert ledger.draw(1, complete + 1) is None
    write(folder, range(complete + 1, 4))
    assert path.read_bytes() == content, "going on gives the file of a run that was never stopped"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_damage_before_complete_rollouts_is_refused(share, flip, whole, tmp_path_factory) -> None:
    """A flipped bit in the middle of the file silently lost the rest of it."""
    content, _ = whole
    position = int(share * len(content))
    folder = tmp_path_factory.mktemp("flipped")
    path = folder / "0-of-1.rollouts"
    damaged = bytearray(content)
    damaged[position] ^= flip
    path.write_bytes(damaged)
    # Damage to the very last frame, the end of a draw, looks like a torn write.
    last_frame = content.rfind(b"RA3L")
    if position >= last_frame:
        with RolloutLedger(folder, "0-of-1", "a") as ledger:
            assert len(ledger) == 2 * len(entries(1))
        return
    with pytest.raises(UserError, match=rf"{path.name} is damaged at byte \d+"):
        RolloutLedger(folder, "0-of-1", "a")
    assert path.read_bytes() == damaged, "nothing is cut where something is wrong"


def test_other_settings_and_other_texts_are_told_apart(tmp_path) -> None:
    """Rollouts of another learning rate were used again; a changed corpus gave its text other people's thoughts."""
    write(tmp_path, (1,))
    with RolloutLedger(tmp_path, "0-of-1", "b") as ledger:
        assert len(ledger) == 0
        assert ledger.draw(1, 1) is None
    trajectories, _ = texts_and_tokens()
    with RolloutLedger(tmp_path, "0-of-1", "a") as ledger, pytest.raises(UserError, match="another text"):
        ledger.read(RolloutKey(1, 1, 0, 0), trajectories[1])


def test_another_number_of_replicas_reads_all_shards(tmp_path) -> None:
    """A run that went on with other processes drew everything again."""
    write(tmp_path, (1,), "0-of-2")
    with RolloutLedger(tmp_path, "0-of-1", "a") as ledger:
        assert RolloutKey(1, 1, 0, 0) in ledger
        assert ledger.draw(1, 1) is None, "what another process did is not this one's cost"
        with pytest.raises(ValueError, match="3 rollouts, 0 were appended"):
            ledger.commit(Draw(1, 1, 0, 3))


def test_rationale_records(tmp_path) -> None:
    """The viewer got token ids, NaN, or gains at lines without a thought."""
    trajectories, think_tokens = texts_and_tokens()
    rollout = made_rollout(trajectories[0], think_tokens, 5)
    n = trajectories[0].num_lines
    record = rationale_record(
        rollout, np.arange(n) * -1.5, np.full(n, np.nan), think_tokens.tokenizer, think_tokens.format, 7, -0.5
    )
    write_rationales(tmp_path / "data" / "r.jsonl", [record, record])
    read = [json.loads(line) for line in (tmp_path / "data" / "r.jsonl").read_text().splitlines()]
    assert read == [record, record]
    assert (record["snippet"], record["member"], record["reward"]) == (7, 0, -0.5)
    lines = record["lines"]
    assert "'''A stack.'''\n" + "".join(line["text"] for line in lines) == think_tokens.tokenizer.decode(
        trajectories[0].ids.tolist()
    )
    assert [line["log_prob"] for line in lines] == [-1.5 * i for i in range(n)]
    assert all(line["advantage"] is None for line in lines)
    thinking = {d.line for d, t in zip(rollout.trajectory.decisions, rollout.thought, strict=True) if t}
    assert thinking
    for number, line in enumerate(lines):
        assert (line["thought"] is not None) == (line["gain"] is not None) == (number in thinking)
        assert line["thought"] is None or ("note" in line["thought"] and "\n" not in line["thought"])
        assert (line["thought_tokens"] > 0) == (number in thinking)
