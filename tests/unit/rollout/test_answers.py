"""The record of answers and verdicts gives back what was written, whatever a crash leaves of the file."""

import numpy as np
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.rollout.answers import AnswerKey, AnswerLedger, DrawCost
from tests.unit.rollout.judged import answer, verdict

KEYS = [AnswerKey(p, m) for p in (4, 5) for m in range(2)]


def drawn(version: int = 3):
    return [answer(k.position, k.member, 3 + k.member, version, version=version) for k in KEYS]


def write(folder, version: int = 3, judged: bool = True, shard: str = "0-of-1"):
    ledger = AnswerLedger(folder, shard, "a")
    found = drawn(version)
    ledger.add_draw(4, KEYS, found, DrawCost(version, len(found), 7, 99))
    if judged:
        ledger.add_verdicts([(k, a, verdict(k.member == 0)) for k, a in zip(KEYS, found, strict=True)])
    ledger.close()
    return ledger.path


def test_everything_comes_back(tmp_path) -> None:
    """An answer or verdict that changed on its way through the file trains on other bits after a crash."""
    write(tmp_path)
    ledger = AnswerLedger(tmp_path, "0-of-1", "a")
    for key, expected in zip(KEYS, drawn(), strict=True):
        assert ledger.has(key, 3)
        assert not ledger.has(key, 2)
        found = ledger.read(key, 3, expected.prompt)
        assert (found.finish, found.text_bytes, found.temperature) == ("stop_id", len(expected.ids), 1.0)
        assert found.ids.dtype == expected.ids.dtype
        np.testing.assert_array_equal(found.ids, expected.ids)
        assert found.log_probs.tobytes() == expected.log_probs.tobytes()
        assert ledger.verdict(key, found) == verdict(key.member == 0)
    assert ledger.cost(4, 3) == DrawCost(3, 4, 7, 99)
    assert ledger.cost(4, 2).tokens == 0


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_torn_verdicts_leave_the_answers(cut, tmp_path) -> None:
    """A crash while verdicts were written threw the answers away with them."""
    path = write(tmp_path, judged=False)
    whole = path.stat().st_size
    path.unlink()
    write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: max(whole, len(content) - cut)])
    ledger = AnswerLedger(tmp_path, "0-of-1", "a")
    assert all(ledger.has(k, 3) for k in KEYS)
    assert ledger.verdict(KEYS[0], drawn()[0]) is None
    assert path.stat().st_size == whole


def test_half_a_draw_does_not_count(tmp_path) -> None:
    """Answers of a draw that was cut were mixed with those of a second try, which had other rows beside them."""
    path = write(tmp_path, judged=False)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    ledger = AnswerLedger(tmp_path, "0-of-1", "a")
    assert not any(ledger.has(k, 3) for k in KEYS)
    assert path.stat().st_size == 0


def test_a_verdict_belongs_to_one_text(tmp_path) -> None:
    """The verdict on another layout's answer, or on other weights', was taken for this one's."""
    write(tmp_path)
    ledger = AnswerLedger(tmp_path, "1-of-2", "a")
    other = answer(4, 0, 9, seed=8, version=3)
    assert ledger.verdict(KEYS[0], other) is None
    assert ledger.verdict(KEYS[0], drawn(2)[0]) is None
    assert ledger.verdict(KEYS[0], drawn()[0]) is not None


def test_other_settings_are_passed_over(tmp_path) -> None:
    """Answers of a policy with another learning rate were trained on after a change of the configuration."""
    write(tmp_path)
    ledger = AnswerLedger(tmp_path, "0-of-1", "b")
    assert not ledger.has(KEYS[0], 3)
    assert ledger.verdict(KEYS[0], drawn()[0]) is None


def test_damage_before_a_whole_draw_is_refused(tmp_path) -> None:
    """A flipped bit in the middle of the file cut everything behind it without a word."""
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged at byte 0"):
        AnswerLedger(tmp_path, "0-of-1", "a")
