"""The E-step on one process: its gradient, what it learns, when it ends, and its other settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ra3_megatron.data.trajectory import Kind
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.groups import Parallel, initialize
from ra3_megatron.report.schema import read_metrics
from ra3_megatron.rollout.experience import Experience
from ra3_megatron.rollout.figures import is_flat
from ra3_megatron.stages.ahead import Block
from tests.e2e.thinking import STAGE, e_step, open_e_step, write_start


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared corpus and weights of a model that thinks at about one line in ten."""
    folder = tmp_path_factory.mktemp("start")
    with initialize() as parallel:
        write_start(folder, parallel)
    return folder


def records(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run / STAGE / "metrics.jsonl") if "reward" in r]


# ------------------------------------------------------------------------------------------------- the gradient


def direct_loss(model: torch.nn.Module, experience: Experience, think_tokens: Any, temperature: float) -> torch.Tensor:
    """- sum over actions of A_t log q(action), over their number: one plain forward pass per rollout."""
    total, count = torch.zeros(()), 0
    vocab = think_tokens.tokenizer.vocab_size
    allowed = np.setdiff1d(np.arange(vocab), think_tokens.forbidden_ids)
    for i, scored in enumerate(experience.scored):
        r = scored.rollout
        trajectory, ids = r.trajectory, torch.from_numpy(r.trajectory.ids.astype(np.int64))
        positions = torch.arange(len(ids)).unsqueeze(0)
        logits = model(input_ids=ids.unsqueeze(0), position_ids=positions, attention_mask=None)[0]
        logits = logits[:, :517] / temperature
        decisions = {d.position: d for d in trajectory.decisions}
        for at in r.positions.tolist():
            row, label = logits[at - 1], int(ids[at])
            thought = trajectory.kinds()[at] == Kind.THOUGHT
            if at in decisions and not thought:
                inside = torch.from_numpy(think_tokens[decisions[at].think_set].ids)
                log_prob = torch.log1p(-row.softmax(-1)[inside].sum())
            elif at in decisions:
                log_prob = row.log_softmax(-1)[label]
            else:
                log_prob = row[label] - row[torch.from_numpy(allowed)].logsumexp(-1)
            total = total - float(experience.advantages[i, trajectory.lines()[at]]) * log_prob
            count += 1
    return total / count


@pytest.mark.parametrize(("scorer", "reward"), [("frozen", "mean"), ("current", "gain")])
def test_a_steps_gradient_is_that_of_the_definition(scorer: str, reward: str, start: Path, tmp_path: Path) -> None:
    """Actions taken at the wrong token, advantages of another line, a sum where a mean was meant: all still train."""
    settings = {"scorer": scorer, "reward": reward, "snippets_per_step": 8}
    latent = {"temperature": 0.8}
    with initialize() as parallel:
        step = open_e_step(start, str(tmp_path), parallel, variational=settings, latent=latent, optimizer=NO_CLIP)
        experience = first_experience(step, parallel)
        thoughts = sum(int(s.rollout.thought.sum()) for s in experience.scored)
        assert thoughts > 3
        bare = step.basis.model()[0]
        loss = direct_loss(bare, experience, step.basis.think_tokens, 0.8)
        loss.backward()
        batches, _ = step.batches(experience)
        result = step.policy.engine.train_step(batches, 1)
        assert result.loss == pytest.approx(surrogate(experience), abs=1e-5)
        trained = dict(unwrap(step.policy.engine.chunks[0]).named_parameters())
        for name, p in bare.named_parameters():
            expected, found = p.grad, trained[name].main_grad
            scale = float(expected.abs().max())
            assert float((found - expected).abs().max()) <= 2e-4 * scale, name
        step.drawing.drawer.__exit__()


NO_CLIP = {"clip_grad": 0.0}


def first_experience(step: Any, parallel: Parallel) -> Experience:
    step.drawing.order(Block(1, 1, 0), 0)
    drawn = step.drawing.collect()
    assert drawn.cost.rollouts == len(drawn.by_step[1]) > 0
    return step.experience(drawn.by_step[1])


def surrogate(experience: Experience) -> float:
    """Value of the clipped loss where the ratio is 1: minus the mean advantage of an action."""
    values = [
        experience.advantages[i, s.rollout.trajectory.lines()[s.rollout.positions]].numpy()
        for i, s in enumerate(experience.scored)
    ]
    return -float(np.concatenate(values).mean())


def test_current_scorer_says_what_the_rollout_said(start: Path, tmp_path: Path) -> None:
    """Scored with windows packed wrongly, or with weights that were not gathered."""
    with initialize() as parallel:
        step = open_e_step(start, str(tmp_path), parallel, variational={"scorer": "current"})
        experience = first_experience(step, parallel)
        for s in experience.scored:
            np.testing.assert_allclose(s.line_log_probs, s.rollout.line_log_probs - s.rollout.log_act, atol=2e-3)
            np.testing.assert_allclose(s.without_thought, s.rollout.without_thought, atol=2e-3)
        step.drawing.drawer.__exit__()


# ------------------------------------------------------------------------------------------------- what it learns


def test_the_reward_rises_where_thoughts_only_cost(start: Path, tmp_path: Path) -> None:
    """The sign of the advantage, baselines that cancel it, rewards credited to the wrong rollout."""
    settings = {
        "steps": 16, "snippets_per_step": 8, "group_size": 4, "price": 10.0, "horizon": 1, "checkpoint_interval": 99,
        "probe_snippets": 24,
    }  # fmt: skip
    result = e_step(str(start), str(tmp_path), variational=settings)
    found = records(tmp_path)
    rates = [r["think_rate"] for r in found]
    assert np.mean(rates[:3]) > 0.03
    assert np.mean(rates[-4:]) < 0.25 * np.mean(rates[:3])
    rise = result["probe_reward_after"] - result["probe_reward_before"]
    assert rise == pytest.approx(result["probe_rise"])
    assert rise > 2.5 * result["probe_rise_error"] > 0
    before, after = (probe_records(tmp_path, when) for when in ("before", "after"))
    assert len(before) == len(after) == 24 * 4
    means = [np.mean([line_count(r) * r["reward"] for r in part]) for part in (before, after)]
    lines = np.mean([line_count(r) for r in before])
    assert (means[1] - means[0]) / lines == pytest.approx(rise, rel=1e-6)
    assert sum(line["thought"] is not None for r in before for line in r["lines"]) > 20


def probe_records(run: Path, when: str) -> list[dict[str, Any]]:
    text = (run / STAGE / "data" / f"rationales-{when}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def line_count(record: dict[str, Any]) -> int:
    return len(record["lines"])


# ------------------------------------------------------------------------------------------------- the end


def test_flat_is_a_rule_about_the_history() -> None:
    """A single bad step ended the stage, or a reward that only jitters never did."""
    rising = [0.1 * i for i in range(20)]
    small, large = [0.01] * 20, [10.0] * 20
    assert not is_flat(rising, small, 10, 1.0)
    assert is_flat(rising, large, 10, 1.0)
    assert is_flat([1.0] * 20, small, 10, 1.0)
    assert is_flat(rising[::-1], small, 10, 1.0)
    assert not is_flat(rising[::-1][:19], small[:19], 10, 1.0), "two windows have to be full"
    assert not is_flat([1.0] * 20, small, 0, 1.0), "0 turns it off"
    assert not is_flat([1.0] * 19 + [float("nan")], small, 10, 1.0)
    jitter = [0.3, -0.3] * 10
    assert is_flat(jitter, [float("nan")] * 20, 10, 1.0), "without errors the scatter stands for them"
    assert not is_flat([0.0] * 10 + [1.0] * 10, [float("nan")] * 20, 10, 1.0)
    # The error of a difference of two means of n is sqrt(2 / n) times a step's.
    step = [0.0] * 8 + [1.0] * 8
    assert not is_flat(step, [1.9] * 16, 8, 1.0)
    assert is_flat(step, [2.1] * 16, 8, 1.0)


def test_a_flat_reward_ends_the_stage(start: Path, tmp_path: Path) -> None:
    """It trained on to the last step, or said that it had."""
    settings = {"flat_window": 2, "flat_tolerance": 1e6, "steps": 9, "max_lag": 2, "probe_snippets": 0}
    result = e_step(str(start), str(tmp_path), variational=settings)
    assert (result["stopped"], result["step"]) == ("flat", 4)
    assert [r["lag"] for r in records(tmp_path)] == [0, 1, 2, 0]
    assert result["probe_rise"] is None
    assert result["reward_last"] == records(tmp_path)[-1]["reward"]
    assert (tmp_path / result["checkpoint"] / "DONE").is_file()


def test_brite_credits_the_whole_snippet(start: Path, tmp_path: Path) -> None:
    """The arm trained with the horizon of RA3."""
    with initialize() as parallel:
        step = open_e_step(start, str(tmp_path), parallel, whole_block=True)
        experience = first_experience(step, parallel)
        for i, length in enumerate(experience.table.lengths.tolist()):
            total = experience.rewards[i].sum()
            torch.testing.assert_close(experience.returns[i, :length], total.expand(length))
        step.drawing.drawer.__exit__()


# ------------------------------------------------------------------------------------------------- other settings


@pytest.mark.parametrize(
    "sections",
    [
        {"variational": {"kl": "bernoulli", "log_latents": 20.0, "correction": "truncate", "max_lag": 1}},
        {"variational": {"reward": "gain", "scorer": "frozen", "max_lag": 1}},
        {"variational": {"reward": "gain"}, "latent": {"posterior": "hindsight"}},
        {"variational": {"scorer": "current"}, "train": {"micro_batch_size": 1}},
    ],
    ids=["bernoulli", "gain", "hindsight", "current"],
)
def test_every_setting_trains_on_what_was_drawn(sections: dict[str, Any], start: Path, tmp_path: Path) -> None:
    """A form of the rollout that is scored and trained in another one: the log-probabilities drift apart."""
    if "latent" in sections:
        sections = {**sections, "train": {"seq_length": 256}}
    result = e_step(str(start), str(tmp_path), **{"variational": {}, **sections})
    found = records(tmp_path)
    assert [r["step"] for r in found] == [1, 2, 3, 4] == list(range(1, result["step"] + 1))
    for r in found:
        assert np.isfinite([r["reward"], r["elbo"], r["grad_norm"], r["elbo_multi_sample"]]).all()
        assert r["actions"] > 20
        assert ("rollout_gap" in r) == (r["lag"] == 0)
        assert r.get("rollout_gap", 0.0) < 1e-3
    assert result["flops"] > 0
    assert result["rollout_tokens"] > result["samples"]
