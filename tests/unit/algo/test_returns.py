import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.returns import (
    ReturnConfig,
    discounted_returns,
    leave_one_out_advantages,
    line_mask,
    line_rewards,
    returns,
)

NAN = float("nan")


def slow_return(rewards: list[float], t: int, horizon: int | None, discount: float) -> float:
    """The definition: from line t to the horizon or the snippet's end."""
    end = len(rewards) if horizon is None else min(t + horizon, len(rewards))
    return sum(discount ** (k - t) * rewards[k] for k in range(t, end))


def test_returns_by_hand():
    """Rewards 1, 2, 4 with a horizon of two lines and a discount of one half; the padding holds NaN."""
    rewards = torch.tensor([[1.0, 2.0, 4.0, NAN]])
    lengths = torch.tensor([3])
    assert discounted_returns(rewards, lengths, 2, 0.5).tolist() == [[2.0, 4.0, 4.0, 0.0]]
    assert discounted_returns(rewards, lengths).tolist() == [[7.0, 6.0, 4.0, 0.0]]
    assert discounted_returns(rewards, lengths, 1).tolist() == [[1.0, 2.0, 4.0, 0.0]]
    assert discounted_returns(rewards, lengths, 3, 0.0).tolist() == [[1.0, 2.0, 4.0, 0.0]]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 13), min_size=1, max_size=4),
    st.none() | st.integers(1, 20),
    st.sampled_from([1.0, 0.9, 0.3, 0.0]),
    st.integers(0, 9999),
)
def test_returns_match_the_loop(lengths, horizon, discount, seed):
    """Every horizon shorter, equal and longer than the snippet; a reward of another snippet or of padding leaked in."""
    width = max(lengths) + seed % 2
    rewards = torch.randn(len(lengths), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, n in enumerate(lengths):
        rewards[row, n:] = NAN
    got = returns(rewards, torch.tensor(lengths), ReturnConfig(horizon=horizon, discount=discount))
    for row, n in enumerate(lengths):
        expected = [slow_return(rewards[row, :n].tolist(), t, horizon, discount) for t in range(n)]
        torch.testing.assert_close(got[row, :n], torch.tensor(expected, dtype=torch.float64))
        assert (got[row, n:] == 0).all()


def test_long_discounted_returns_stay_finite():
    """Dividing a cumulative sum by discount^t overflows after some hundred lines."""
    got = discounted_returns(torch.ones(1, 3000), torch.tensor([3000]), None, 0.5)
    torch.testing.assert_close(got[0, :2900], torch.full((2900,), 2.0))


def test_whole_block_gives_one_number_to_all_lines():
    """BRiTE: the sum of the snippet, also for its last line; a horizon with it would be ignored, so it is refused."""
    config = ReturnConfig(horizon=None, whole_block=True)
    rewards = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]])
    assert returns(rewards, torch.tensor([2, 3]), config).tolist() == [[3.0, 3.0, 0.0], [12.0, 12.0, 12.0]]
    for bad in ({"horizon": 5}, {"horizon": None, "discount": 0.9}):
        with pytest.raises(ValueError, match="whole_block"):
            ReturnConfig(whole_block=True, **bad)


@pytest.mark.parametrize("bad", [{"horizon": 0}, {"discount": 1.5}, {"discount": -0.1}])
def test_impossible_settings_are_refused(bad):
    """A horizon of zero lines is a reward of zero everywhere."""
    with pytest.raises(ValueError, match=r"horizon|discount"):
        ReturnConfig(**bad)


def test_rewards_by_hand():
    """Two lines of 2 and 4 tokens, a thought before the second; padding holds NaN and no tokens."""
    args = (
        torch.tensor([[-3.0, -2.0, NAN]]),
        torch.tensor([[2, 4, 0]]),
        torch.tensor([[0.0, 0.05, NAN]]),
        torch.tensor([2]),
    )
    torch.testing.assert_close(line_rewards(*args), torch.tensor([[-1.5, -0.55, 0.0]]))
    torch.testing.assert_close(line_rewards(*args, "sum"), torch.tensor([[-3.0, -2.05, 0.0]]))
    without = torch.tensor([[-3.0, -4.0, NAN]])
    torch.testing.assert_close(line_rewards(*args, "gain", without), torch.tensor([[0.0, 0.45, 0.0]]))


def test_rewards_say_what_is_missing():
    """`gain` without its base line, or a base line that is ignored, or an empty line, gave plausible numbers."""
    one = torch.ones(1, 1)
    args = (one, one.long(), one, torch.tensor([1]))
    with pytest.raises(ValueError, match="gain"):
        line_rewards(*args, "gain")
    with pytest.raises(ValueError, match="gain"):
        line_rewards(*args, "mean", one)
    with pytest.raises(ValueError, match="unknown reward"):
        line_rewards(*args, "median")
    with pytest.raises(ValueError, match="no tokens"):
        line_rewards(one, torch.zeros(1, 1), one, torch.tensor([1]))
    with pytest.raises(ValueError, match="do not fit"):
        line_mask(torch.tensor([3]), 2)


def test_advantages_by_hand():
    """Three rollouts of snippet 0 (1, 2, 6 at its line), two of snippet 1, mixed up in the batch."""
    values = torch.tensor([[1.0, NAN], [4.0, 3.0], [2.0, NAN], [6.0, NAN], [0.0, 5.0]])
    groups, lengths = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([1, 2, 1, 1, 2])
    got = leave_one_out_advantages(values, groups, lengths)
    torch.testing.assert_close(got, torch.tensor([[-3.0, 0.0], [4.0, -2.0], [-1.5, 0.0], [4.5, 0.0], [-4.0, 2.0]]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(2, 5), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 9999))
def test_advantages_match_the_loop(sizes, seed):
    """Each line's baseline is the mean of the other members at that line, and of nobody else."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.tensor([i for i, (members, _) in enumerate(sizes) for _ in range(members)])
    groups = groups[torch.randperm(len(groups), generator=g)]
    lengths = torch.tensor([sizes[i][1] for i in groups.tolist()])
    values = torch.randn(len(groups), int(lengths.max()), generator=g, dtype=torch.float64) + 100
    got = leave_one_out_advantages(values, groups, lengths)
    for i in range(len(groups)):
        for t in range(values.size(1)):
            others = [values[j, t].item() for j in range(len(groups)) if j != i and groups[j] == groups[i]]
            expected = values[i, t].item() - sum(others) / len(others) if t < lengths[i] else 0.0
            assert got[i, t].item() == pytest.approx(expected, abs=1e-9)


def test_advantages_refuse_what_has_no_baseline():
    """A group of one divided by zero; members of different length compare different lines."""
    values = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="group 1 has one rollout"):
        leave_one_out_advantages(values, torch.tensor([0, 0, 1]), torch.tensor([2, 2, 2]))
    with pytest.raises(ValueError, match="differ in their number"):
        leave_one_out_advantages(values, torch.tensor([0, 0, 0]), torch.tensor([2, 1, 2]))
