import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.diagnostics import (
    Durations,
    calibration,
    durations,
    effective_actions,
    gain,
    thinking,
)

NAN = float("nan")


def batch(rows: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows like "T..T" to (thinks, lengths); the padding claims to think."""
    width = max(map(len, rows))
    thinks = torch.tensor([[c == "T" for c in row.ljust(width, "T")] for row in rows])
    return thinks, torch.tensor([len(row) for row in rows])


def test_thinking_by_hand():
    """Three thoughts of 2, 4 and 6 tokens in seven lines; padding is neither a line nor a thought."""
    thinks, lengths = batch(["T.T.", ".T."])
    tokens = torch.tensor([[2, 9, 4, 9], [9, 6, 9, 9]])
    got = thinking(thinks, tokens, lengths)
    assert got.rate == pytest.approx(3 / 7)
    assert got.mean_tokens == pytest.approx(4.0)
    both = got + got
    assert both.rate == got.rate
    assert float(both.lines) == 14
    nothing = thinking(thinks & False, tokens, lengths)
    assert nothing.rate == 0.0
    assert math.isnan(nothing.mean_tokens)


def test_durations_by_hand():
    """tau = 2 ended, tau >= 2 cut off (so tau > 1); the second snippet's latent has tau >= 1, which says nothing."""
    got = durations(*batch([".T.T.", "..T"]), longest=4)
    assert got.ended.tolist() == [0, 0, 1, 0, 0]
    assert got.outlived.tolist() == [1, 1, 0, 0, 0]
    assert got.cut_off == pytest.approx(2 / 3)
    # Of two latents at risk of ending at 1 none did; of one at risk at 2 it did: tau = 2.
    assert got.survival().tolist() == [1.0, 1.0, 0.0]
    assert got.mean == 2.0
    assert got.mean_discount(0.9) == pytest.approx(0.81)
    assert math.isnan(durations(*batch(["..."])).mean)
    assert math.isnan(durations(*batch(["..."])).mean_discount(0.9))


def slow_durations(rows: list[str], longest: int) -> tuple[list[int], list[int]]:
    """Walk over every snippet."""
    ended, outlived = [0] * (longest + 1), [0] * (longest + 1)
    for row in rows:
        starts = [t for t, c in enumerate(row) if c == "T"]
        for t, after in zip(starts, [*starts[1:], None], strict=False):
            if after is None:
                outlived[min(len(row) - 1 - t, longest)] += 1
            elif after - t > longest:
                outlived[longest] += 1
            else:
                ended[after - t] += 1
    return ended, outlived


def slow_kaplan_meier(ended: list[int], outlived: list[int], discount: float) -> tuple[float, float]:
    """(mean, mean of discount^tau): product of the shares that went on, line by line, in its textbook form."""
    alive, mean, discounted = 1.0, 0.0, 0.0
    last = max(k for k in range(len(ended)) if ended[k] + outlived[k])
    for k in range(1, last + 1):
        risk = sum(ended[k:]) + sum(outlived[k:])
        ends = alive * ended[k] / risk
        mean += k * ends
        discounted += discount**k * ends
        alive -= ends
    return mean + (last + 1) * alive, discounted + discount ** (last + 1) * alive


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("T.", min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 9))
def test_durations_match_the_loop(rows, longest):
    """Thoughts at the first and last line, none at all, and durations above the longest that is counted."""
    got = durations(*batch(rows), longest)
    ended, outlived = slow_durations(rows, longest)
    assert got.ended.tolist() == ended
    assert got.outlived.tolist() == outlived
    if sum(ended) + sum(outlived):
        mean, discounted = slow_kaplan_meier(ended, outlived, 0.8)
        assert got.mean == pytest.approx(mean)
        assert got.mean_discount(0.8) == pytest.approx(discounted)


def test_cut_off_durations_do_not_bias_the_mean():
    """Geometric durations of mean 5 in snippets of 12 lines: leaving the last one out says 3.5 or less."""
    g = torch.Generator().manual_seed(0)
    thinks = torch.rand(20_000, 12, generator=g) < 0.2
    got = durations(thinks, torch.full((20_000,), 12))
    completed = float((got.ended * torch.arange(257)).sum() / got.ended.sum())
    assert completed < 4.0
    # P(tau = k) = 0.2 * 0.8^(k-1); what outlasts 11 lines is taken to end at the 12th.
    expected = sum(0.8**k for k in range(12))
    assert got.mean == pytest.approx(expected, rel=0.01)
    exact = 0.2 * 0.9 / (1 - 0.8 * 0.9)
    assert got.mean_discount(0.9) == pytest.approx(exact, rel=0.02)


def test_durations_join_over_processes():
    """Means of means over processes are not the mean; sums are."""
    one, two = durations(*batch(["TT", "T.T.."])), durations(*batch(["T..T", "T"]))
    joined = (one + two).map(lambda x: x * 2)
    assert isinstance(joined, Durations)
    whole = durations(*batch(["TT", "T.T..", "T..T", "T"] * 2))
    assert joined.ended.tolist() == whole.ended.tolist()
    assert joined.mean == pytest.approx(whole.mean)


def test_gain_by_hand():
    """Gains of 1 and -0.5 nats per token at two thought lines; other lines hold NaN."""
    thinks, lengths = batch(["T.", "T"])
    got = gain(
        torch.tensor([[-2.0, -9.0], [-4.0, NAN]]),
        torch.tensor([[-4.0, NAN], [-3.0, NAN]]),
        torch.tensor([[2, 5], [2, 0]]),
        thinks,
        lengths,
    )
    assert got.mean == pytest.approx(0.25)
    assert got.share_helped == 0.5
    values = torch.tensor([1.0, -0.5])
    assert got.standard_error == pytest.approx((values.std() / math.sqrt(2)).item())
    assert math.isnan(gain(*[torch.zeros(1, 1)] * 2, torch.ones(1, 1), torch.zeros(1, 1).bool(), torch.ones(1)).mean)


def test_effective_actions_by_hand():
    """A fair decision and a settled one: exp(log 2 / 2); lines of log 8 and log 2 nats: 4 lines in effect."""
    decision = Decision(torch.tensor([0.5, 1e-30]).log(), torch.tensor([0.5, 1.0]).log())
    lines = torch.tensor([[-math.log(8), NAN], [-math.log(2), NAN]], requires_grad=True)
    got = effective_actions(decision, lines, torch.tensor([1, 1]))
    assert got.of_decision == pytest.approx(math.sqrt(2), rel=1e-6)
    assert got.of_line == pytest.approx(4.0, rel=1e-6)
    assert not got.line_nats.requires_grad
    long = effective_actions(decision, torch.tensor([[-5000.0]]), torch.tensor([1]))
    assert (long.of_line, long.nats_of_line) == (math.inf, 5000.0)


def test_calibration_by_hand():
    """Two bins: 0.2 and 0.4 with one true outcome, 0.9 and 1.0 with one; the edge 1.0 belongs to the last bin."""
    p = torch.tensor([0.2, 0.4, 0.9, 1.0])
    got = calibration(p, torch.tensor([True, False, False, True]), bins=2)
    assert [row[0] for row in got.reliability] == [2, 2]
    assert [x for row in got.reliability for x in row[1:]] == pytest.approx([0.3, 0.5, 0.95, 0.5])
    assert got.expected_error == pytest.approx((0.2 + 0.45) / 2)
    assert got.brier == pytest.approx((0.64 + 0.16 + 0.81 + 0.0) / 4)
    assert len(calibration(p[2:], torch.tensor([True, True]), bins=5).reliability) == 1


def test_drawn_decisions_are_calibrated():
    """What is drawn with p_think happens with p_think; with another temperature's p_think it does not."""
    g = torch.Generator().manual_seed(0)
    odds = torch.randn(20_000, generator=g) * 2
    decision = Decision(torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds))
    drawn = decision.draw(torch.rand(20_000, generator=g))
    assert calibration(decision.p_think, drawn).expected_error < 0.015
    assert calibration((odds / 3).sigmoid(), drawn).expected_error > 0.05
