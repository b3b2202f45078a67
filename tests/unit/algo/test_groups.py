"""Group advantages against a slow reference and by hand; which groups teach nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.groups import answer_weight, flat_groups, group_advantages, overlong_penalty

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def test_by_hand() -> None:
    """A deviation over n instead of n - 1, a baseline with the answer itself in leave-one-out (TRL, verl: n - 1)."""
    third = 1 / 3
    assert group_advantages(REWARDS, GROUPS, "centred").tolist() == pytest.approx([2 * third, -third, -third] * 2)
    assert group_advantages(REWARDS, GROUPS, "leave_one_out").tolist() == pytest.approx([1.0, -0.5, -0.5] * 2)
    deviation = third**0.5  # of 1, 0, 0
    expected = [2 * third / (deviation + 1e-4), -third / (deviation + 1e-4)]
    assert group_advantages(REWARDS, GROUPS, "normalised").tolist()[:2] == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_against_a_loop_over_groups(data: st.DataObject) -> None:
    """Groups of different size, or in mixed order, took one another's mean."""
    sizes = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    owner = data.draw(st.permutations([g for g, n in enumerate(sizes) for _ in range(n)]))
    values = data.draw(st.lists(st.floats(-2, 2), min_size=len(owner), max_size=len(owner)))
    rewards, groups = torch.tensor(values, dtype=torch.float64), torch.tensor(owner)
    for kind in ("normalised", "centred", "leave_one_out"):
        found = group_advantages(rewards, groups, kind)  # type: ignore[arg-type]
        for i, (g, value) in enumerate(zip(owner, values, strict=True)):
            own = [v for v, o in zip(values, owner, strict=True) if o == g]
            others = [v for j, (v, o) in enumerate(zip(values, owner, strict=True)) if o == g and j != i]
            mean = sum(own) / len(own)
            expected = {
                "centred": value - mean,
                "leave_one_out": value - sum(others) / len(others),
                "normalised": (value - mean) / (torch.tensor(own, dtype=torch.float64).std().item() + 1e-4),
            }[kind]
            assert float(found[i]) == pytest.approx(expected, abs=1e-9), kind


def test_a_group_of_one_is_refused() -> None:
    """An answer alone became its own baseline, and its advantage a division by zero."""
    with pytest.raises(ValueError, match="one rollout"):
        group_advantages(REWARDS[:4], GROUPS[:4], "normalised")


def test_groups_that_teach_nothing() -> None:
    """A group all right, all wrong, of one answer, or without any was kept; one with a single other reward dropped."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.25, 1.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, 4])
    assert flat_groups(rewards, groups, 5).tolist() == [True, True, False, True, True]


def test_soft_punishment() -> None:
    """DAPO eq. 13: nothing up to the buffer, all at the limit, a line in between."""
    lengths = torch.tensor([1.0, 60.0, 80.0, 100.0], dtype=torch.float64)
    assert overlong_penalty(lengths, 100, 40).tolist() == [0.0, 0.0, 0.5, 1.0]


def test_weights_of_tokens() -> None:
    """A sequence mean that weighs long answers more."""
    assert 5 * answer_weight(5, "sequence_mean") == pytest.approx(3 * answer_weight(3, "sequence_mean"))
    assert answer_weight(5, "token_mean") == answer_weight(3, "constant") == 1.0
