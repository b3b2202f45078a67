"""Judged groups: rewards, what is left out, what the training engine gets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.sections import TrainConfig
from ra3_megatron.data.packing import TrainSequence, pack, padded
from ra3_megatron.rollout.answer_figures import AnswerFigures
from ra3_megatron.rollout.groups import (
    ANSWERS,
    AnswerGroup,
    answer_batches,
    answer_sequences,
    flat,
)
from ra3_megatron.rollout.windows import LENGTHS, Windows
from tests.unit.rollout.judged import answer, group, verdict


def test_lost_answers_are_no_reward_of_zero() -> None:
    """A failure of the judge's machine taught the policy that its answer was wrong (verl#5867 and its like)."""
    found = group(0, [True, None, True])
    assert (len(found.answers), found.lost) == (2, 1)
    assert found.rewards(RlvrConfig()).tolist() == [1.0, 1.0]
    # Those left are all right: nothing to learn.
    assert flat([found, group(1, [True, None]), group(2, [True, False])], RlvrConfig()).tolist() == [True, True, False]


def test_rewards() -> None:
    """A fraction paid where all tests were asked for, a punishment of a short answer."""
    answers = [answer(0, m, n) for m, n in enumerate((10, 50, 45))]
    found = AnswerGroup.of(0, 0, 0, answers, [verdict(True), verdict(False, 1), verdict(False, 3)])
    assert found.rewards(RlvrConfig()).tolist() == [1.0, 0.0, 0.0]
    assert found.rewards(RlvrConfig(reward="fraction")).tolist() == [1.0, 0.25, 0.75]
    soft = RlvrConfig(max_tokens=50, overlong="soft", overlong_buffer=10)
    assert found.rewards(soft).tolist() == [1.0, -1.0, -0.5]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_a_cut_answer_is_out_of_the_loss_and_in_the_mean(aggregation) -> None:
    """Masking that took the answer out of its group's mean too, or its share out of Dr. GRPO's divisor."""
    answers = [answer(0, 0, 4), answer(0, 1, 6, finish="length"), answer(0, 2, 5)]
    found = AnswerGroup.of(0, 0, 0, answers, [verdict(True), verdict(False), verdict(False)])
    config = RlvrConfig(max_tokens=6, aggregation=aggregation, advantage="centred")
    sequences = answer_sequences([found], config)
    weights = [s.weights["policy_gradient"] for s in sequences]
    assert [int((w > 0).sum()) for w in weights] == [4, 0, 5]
    assert sequences[0].extras["advantages"][3:].tolist() == pytest.approx([2 / 3] * 4)
    assert sequences[2].extras["advantages"][3:].tolist() == pytest.approx([-1 / 3] * 5)
    if aggregation == "sequence_mean":
        assert [float(w.sum()) for w in weights] == pytest.approx([1.0, 0.0, 1.0])
    if aggregation == "constant":
        assert sum(float(s.weights[ANSWERS].sum()) for s in sequences) == 3 * 6
    kept = answer_sequences([found], RlvrConfig(max_tokens=6, aggregation=aggregation, overlong="keep"))
    assert int((kept[1].weights["policy_gradient"] > 0).sum()) == 6


def test_log_probs_stand_beside_their_tokens() -> None:
    """Behaviour log-probs off by one, or put on the prompt: every ratio is wrong and nothing fails."""
    found = group(3, [True, False])
    for one, sequence in zip(found.answers, answer_sequences([found], RlvrConfig()), strict=True):
        start = len(one.prompt.ids)
        np.testing.assert_array_equal(sequence.ids, np.concatenate((one.prompt.ids, one.ids)))
        np.testing.assert_allclose(sequence.extras["behaviour_log_probs"][start:], one.log_probs, rtol=1e-6)
        assert not sequence.weights["policy_gradient"][:start].any()
        assert not sequence.extras["behaviour_log_probs"][:start].any()


def test_figures_add_up_over_replicas() -> None:
    """Means of means: a replica with few answers weighed as much as one with many."""
    config = RlvrConfig()
    every = [group(0, [True, False, None]), group(1, [True, True]), group(2, [False, False, False])]
    idle = flat(every, config)
    whole = AnswerFigures.of(every, idle, config)
    parts = [AnswerFigures.of(every[i : i + 1], idle[i : i + 1], config) for i in range(3)]
    summed = AnswerFigures({k: sum(p.sums[k] for p in parts) for k in whole.sums})
    assert summed.metrics() == pytest.approx(whole.metrics())
    m = whole.metrics()
    assert (m["answers"], m["groups"], m["groups_used"], m["groups_flat"], m["verdict_lost"]) == (7, 3, 1, 2, 1)
    assert m["pass_rate"] == pytest.approx(3 / 7)
    assert (m["groups_all_right"], m["groups_all_wrong"]) == pytest.approx((1 / 3, 1 / 3))
    lengths = [len(a.ids) for g in every for a in g.answers]
    assert m["answer_tokens"] == pytest.approx(np.mean(lengths))


@given(
    lengths=st.lists(st.integers(1, 256), max_size=40), multiple=st.sampled_from([1, 4]), spare=st.integers(0, 2),
    longest=st.sampled_from([256, 400, 1024, 16384]),
)  # fmt: skip
def test_windows_no_longer_than_needed(lengths, multiple, spare, longest) -> None:
    """Windows of the full length for the sake of a few tokens; one too short made a sequence too many."""
    sizes = np.array(lengths, dtype=np.int64)
    windows = len(pack(sizes, longest, multiple)) + spare or 1
    texts = [TrainSequence(np.zeros(n, np.int32), {}) for n in lengths]
    made = Windows(texts, longest, multiple, 16 * multiple, 1)
    assert made.fewest == len(pack(sizes, longest, multiple))
    found, filled = made.fill(windows)
    assert sorted(len(s.ids) for window in filled for s in window) == sorted(lengths)
    assert all(padded(np.array([len(s.ids) for s in w]), multiple).sum() <= found for w in filled)
    assert found == longest or (found < longest and found % (16 * multiple) == 0)
    assert len(pack(sizes, found, multiple)) <= windows
    assert padded(sizes, multiple).sum() <= found * windows
    if windows == 1 and lengths:
        step = max(16 * multiple, longest // LENGTHS)
        assert found < padded(sizes, multiple).sum() + step


def test_an_update_pads_little(parallel) -> None:
    """A tenth of an update's tokens were padding: whole windows of `train.seq_length`, the last one all but empty."""
    answers = [answer(n, m, 40 + 5 * m) for n in range(4) for m in range(8)]
    groups = [
        AnswerGroup.of(n, n, n, answers[8 * n : 8 * n + 8], [verdict(m % 2 == 0) for m in range(8)]) for n in range(4)
    ]
    config, train = RlvrConfig(max_tokens=80), TrainConfig(steps=1, seq_length=512, micro_batch_size=2)
    sequences = answer_sequences(groups, config)
    batches = answer_batches(sequences, config, train, parallel, 1)
    tokens = sum(len(s.ids) for s in sequences)
    assert len(batches) == -(-tokens // 1024)
    assert len({b.input_ids.numel() for b in batches}) == 1
    assert tokens <= sum(b.input_ids.numel() for b in batches) < 1.08 * tokens
    weights = sum(float(b.weights["policy_gradient"].sum()) for b in batches)
    assert weights == sum(len(a.ids) for a in answers)
    (none,) = answer_batches([], config, train, parallel, 1)
    assert not any(w.any() for w in none.weights.values())
