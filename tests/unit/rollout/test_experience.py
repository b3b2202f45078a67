"""Rewards, advantages and figures of a batch against the definitions, written out line by line."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from ra3_megatron.algo.elbo import PriorConfig
from ra3_megatron.algo.returns import ReturnConfig
from ra3_megatron.config.ra3 import VariationalConfig
from ra3_megatron.data.trajectory import Kind, splice
from ra3_megatron.rollout.experience import Member, RewardSettings, ScoredRollout, make_experience, whole_programs
from ra3_megatron.rollout.figures import batch_figures, clustered_mean
from tests.unit.rollout.made import made_rollout, texts_and_tokens

GROUP = 3


def scored_rollouts(seed: int = 0, slots: int = 4) -> list[ScoredRollout]:
    trajectories, think_tokens = texts_and_tokens()
    chance = np.random.default_rng(seed)
    found = []
    for slot in range(slots):
        expert = trajectories[slot % len(trajectories)]
        for member in range(GROUP):
            r = made_rollout(expert, think_tokens, seed, slot, member)
            thinks = np.zeros(expert.num_lines, dtype=bool)
            thinks[list(r.trajectory.thoughts())] = True
            lines = r.line_log_probs - chance.random(expert.num_lines)
            bare = np.random.default_rng([seed, slot]).normal(-2, 0.3, expert.num_lines)
            without = np.where(thinks, lines - chance.normal(size=len(lines)), np.nan)
            found.append(ScoredRollout(slot, r, lines, without, bare, -50 - float(chance.random())))
    return found


def direct(scored: list[ScoredRollout], reward: str, price: float, horizon: int | None, discount: float):
    """(rewards, advantages) per rollout, as the algorithm's notes define them."""
    rewards = []
    for s in scored:
        trajectory, own = s.rollout.trajectory, []
        for line in range(trajectory.num_lines):
            code, thought = trajectory.segment(line), trajectory.segment(line, Kind.THOUGHT)
            n = code.end - code.start
            value = s.line_log_probs[line] / (1 if reward == "sum" else n)
            if reward == "gain":
                value = 0.0 if thought is None else (s.line_log_probs[line] - s.without_thought[line]) / n
            own.append(value - price * (thought is not None))
        rewards.append(own)
    returns = [
        [sum(discount ** (k - t) * r[k] for k in range(t, min(t + (horizon or len(r)), len(r)))) for t in range(len(r))]
        for r in rewards
    ]
    advantages = [
        [
            own[t] - np.mean([returns[j][t] for j, o in enumerate(scored) if o.slot == s.slot and j != i])
            for t in range(len(own))
        ]
        for i, (s, own) in enumerate(zip(scored, returns, strict=True))
    ]
    return rewards, advantages


@pytest.mark.parametrize("reward", ["mean", "sum", "gain"])
@pytest.mark.parametrize(("horizon", "discount"), [(2, 1.0), (None, 0.7)])
def test_rewards_and_advantages_are_the_definitions(reward, horizon, discount) -> None:
    """A line's reward went to another line, or a rollout was its own baseline."""
    scored = scored_rollouts()
    config = VariationalConfig(reward=reward, price=0.05, horizon=horizon, discount=discount)
    experience = make_experience(scored, RewardSettings.of(config, whole_block=False))
    rewards, advantages = direct(scored, reward, 0.05, horizon, discount)
    assert any(s.rollout.thought.any() for s in scored)
    for i, own in enumerate(advantages):
        np.testing.assert_allclose(experience.advantages_of(i), own, atol=1e-12)
        assert experience.mean_reward(i) == pytest.approx(np.mean(rewards[i]), abs=1e-12)


def test_whole_block_gives_every_line_the_same_return() -> None:
    """BRiTE's arm kept the configured horizon."""
    scored = scored_rollouts()
    experience = make_experience(scored, RewardSettings.of(VariationalConfig(horizon=2), whole_block=True))
    rewards, _ = direct(scored, "mean", 0.05, None, 1.0)
    for i, own in enumerate(rewards):
        np.testing.assert_allclose(experience.returns[i, : len(own)], sum(own), atol=1e-12)


def test_bernoulli_cost_stands_at_decisions_alone() -> None:
    """Lines without a decision paid for one, at probability one half."""
    scored = scored_rollouts()
    prior = PriorConfig("bernoulli", stay=0.9, log_latents=12.0)
    experience = make_experience(scored, RewardSettings("mean", prior, ReturnConfig()))
    seen = 0
    for i, s in enumerate(scored):
        r, trajectory = s.rollout, s.rollout.trajectory
        costs = np.zeros(trajectory.num_lines)
        for decision, p, thinks in zip(trajectory.decisions, r.p_think, r.thought, strict=True):
            costs[decision.line] = p * math.log(p / 0.1) + (1 - p) * math.log((1 - p) / 0.9)
            if thinks:
                own = trajectory.lines()[r.positions] == decision.line
                costs[decision.line] += 12.0 + (r.log_probs - r.log_allowed)[own].sum() - math.log(p)
                seen += 1
        np.testing.assert_allclose(experience.cost[i, : len(costs)], costs, atol=1e-6)
    assert seen > 3


def test_figures_are_means_over_the_batch() -> None:
    """Thoughts were counted as lines, or forced tokens as samples."""
    scored = scored_rollouts(3)
    experience = make_experience(scored, RewardSettings.of(VariationalConfig(), whole_block=False), broken=2)
    found = batch_figures(experience, price=0.05).metrics(0.9)
    rollouts = [s.rollout for s in scored]
    lines = np.array([r.trajectory.num_lines for r in rollouts])
    thoughts = sum(int(r.thought.sum()) for r in rollouts)
    rewards, _ = direct(scored, "mean", 0.05, 5, 1.0)
    assert found["reward"] == pytest.approx(sum(map(sum, rewards)) / lines.sum())
    assert found["think_rate"] == pytest.approx(thoughts / sum(len(r.thought) for r in rollouts))
    lengths = [len(ids) for r in rollouts for ids in r.trajectory.thoughts().values()]
    assert found["thought_tokens"] == pytest.approx(np.mean(lengths))
    code = sum(int((r.trajectory.kinds() == Kind.CODE).sum()) for r in rollouts)
    likelihood = sum(s.line_log_probs.sum() for s in scored)
    assert found["elbo"] == pytest.approx((likelihood - 0.05 * thoughts) / code)
    assert found["line_nats"] == pytest.approx(-likelihood / lines.sum())
    gains, forecasts = [], []
    for r in rollouts:
        for decision, p, thinks in zip(r.trajectory.decisions, r.p_think, r.thought, strict=True):
            if thinks:
                code_line = r.trajectory.segment(decision.line)
                given = r.line_log_probs[decision.line] - r.log_act[decision.line]
                difference = given - r.without_thought[decision.line]
                gains.append(difference / (code_line.end - code_line.start))
                forecasts.append((p - (gains[-1] > 0.05)) ** 2)
    assert found["gain"] == pytest.approx(np.mean(gains))
    assert found["gain_error"] == pytest.approx(np.std(gains, ddof=1) / math.sqrt(len(gains)))
    assert found["calibration_brier"] == pytest.approx(np.mean(forecasts))
    assert found["truncated_thoughts"] == pytest.approx(sum(len(r.truncated) for r in rollouts) / thoughts)
    missing = sum(r.not_offered for r in rollouts)
    assert found["not_offered"] == pytest.approx(missing / (missing + sum(len(r.thought) for r in rollouts)))
    bare = [np.mean([r - b / n for r, b, n in zip(own, s.bare_log_probs, tokens_of(s), strict=True)])
            for own, s in zip(rewards, scored, strict=True)]  # fmt: skip
    assert found["reward_over_bare"] == pytest.approx(np.average(bare, weights=lines))
    bounds, tokens = [], []
    for slot in range(4):
        own = [s for s in scored if s.slot == slot]
        weights = [s.log_joint - (s.rollout.log_probs - s.rollout.log_allowed).sum() for s in own]
        bounds.append(np.logaddexp.reduce(weights) - math.log(GROUP))
        tokens.append(int((own[0].rollout.trajectory.kinds() == Kind.CODE).sum()))
    assert found["elbo_multi_sample"] == pytest.approx(sum(bounds) / sum(tokens))


def tokens_of(scored: ScoredRollout) -> list[int]:
    return [s.end - s.start for s in scored.rollout.trajectory.segments if s.kind == Kind.CODE]


def test_two_replicas_report_what_one_does() -> None:
    """A mean of means over replicas; an empty replica made everything NaN."""
    scored = scored_rollouts(1)
    settings = RewardSettings.of(VariationalConfig(), whole_block=False)
    whole = batch_figures(make_experience(scored, settings), 0.05)
    parts = [scored[: GROUP * 1], scored[GROUP:], []]
    figures = [batch_figures(make_experience(part, settings), 0.05) for part in parts]
    sums = []
    for f in figures:
        f.reduced(lambda x: sums.append(x) or x)
    total = figures[0].reduced(lambda _: torch.stack(sums).sum(0))
    for name, value in whole.metrics(0.9).items():
        assert total.metrics(0.9)[name] == pytest.approx(value, nan_ok=True), name
    assert whole.totals.rollouts == 4 * GROUP
    added = (figures[0] + figures[1]).metrics(0.9)
    assert added["reward_error"] == pytest.approx(whole.metrics(0.9)["reward_error"])


def test_standard_error_covers_the_truth() -> None:
    """Lines of one snippet taken as independent: the error came out several times too small."""
    generator = torch.Generator().manual_seed(0)
    misses = 0
    for _ in range(300):
        counts = torch.randint(2, 20, (60,), generator=generator).double()
        common = torch.randn(60, generator=generator, dtype=torch.float64)
        totals = counts * common + counts.sqrt() * torch.randn(60, generator=generator, dtype=torch.float64)
        found = clustered_mean(totals, counts, torch.arange(60))
        misses += abs(found.mean) > 2 * found.standard_error
    assert 4 <= misses <= 36, "about one in twenty"


def test_thoughts_that_change_the_program_are_dropped_with_what_is_left_alone() -> None:
    """Code swallowed by a thought was trained on; a group of one had no baseline and stopped the run."""
    trajectories, think_tokens = texts_and_tokens()
    tokenizer = think_tokens.tokenizer
    expert = trajectories[1]
    fine = [made_rollout(expert, think_tokens, 1, 0, member) for member in range(4)]
    bad = tokenizer.encode("    other = 1\n")

    def broken(r):
        line = expert.decisions[-1].line
        thought = np.array([d.line == line for d in expert.decisions])
        return dataclasses.replace(r, trajectory=splice(expert, {line: bad}), thought=thought)

    # slot 0: all fine; slot 1: one of three broken; slot 2: one of two broken, the other is alone.
    pairs = [(0, fine[0]), (0, fine[1]), (1, fine[0]), (1, fine[2]), (1, broken(fine[3]))]
    pairs += [(2, fine[1]), (2, broken(fine[0]))]
    kept, dropped, alone = whole_programs([Member(slot, expert, r, r) for slot, r in pairs], think_tokens)
    assert [m.slot for m in kept] == [0, 0, 1, 1]
    assert (dropped, alone) == (2, 1)
