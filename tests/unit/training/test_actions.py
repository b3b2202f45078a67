"""Scores of actions against log_softmax over the whole vocabulary, values and gradients."""

import pytest
import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision, TokenSets
from ra3_megatron.algo.elbo import bernoulli_kl
from ra3_megatron.algo.logprobs import VocabShard
from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.training import actions
from ra3_megatron.training.actions import ActionRows, ActionTable, score_actions
from ra3_megatron.training.components import (
    LossComponent,
    Values,
    code_cross_entropy_component,
    cross_entropy_component,
    decision_kl_component,
    policy_gradient_component,
)
from tests.unit.training import tiny

SETS, FORBIDDEN = [[3], [5, 40, 100]], [0, 1, 7, 99]
TABLE = ActionTable(TokenSets.make(SETS), torch.tensor(FORBIDDEN), temperature=0.6)
# Rows 4 to 11 of tiny's batches have weight: two acts, two deciding tokens, three later tokens, one act.
THINK_SET = torch.tensor([0, 0, 0, 0, 1, 2, 1, 2, 0, 0, 0, 2, 0, 0, 0, 0]).float()
THOUGHT = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).float()


def batch(seed: int):
    g = torch.Generator().manual_seed(seed)
    extras = {
        "think_set": THINK_SET,
        "thought": THOUGHT,
        "behaviour_log_probs": -0.5 - torch.rand(tiny.SEQ, generator=g),
        "advantages": torch.randn(tiny.SEQ, generator=g),
    }
    made = tiny.batch(seed, "policy_gradient", **extras)
    made.labels[8:11] = torch.tensor([2, 50, 98])
    return made


def slow_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[rows with an action] log-probabilities of the actions, [decisions] log-odds of thinking: one row at a time."""
    allowed = [i for i in range(logits.size(1)) if i not in FORBIDDEN]
    found, odds = [], []
    for row, label, think_set, thought in zip(logits, labels, THINK_SET.int(), THOUGHT, strict=True):
        log_p = (row / TABLE.temperature).log_softmax(-1)
        if think_set:
            p_think = log_p.exp()[SETS[think_set - 1]].sum()
            found.append(log_p[label] if thought else torch.log(1 - p_think))
            odds.append(torch.log(p_think) - torch.log(1 - p_think))
        elif thought:
            found.append((row / TABLE.temperature)[allowed].log_softmax(-1)[allowed.index(int(label))])
    return torch.stack(found), torch.stack(odds)


@pytest.mark.parametrize("rows", [2, 1024])
def test_scores_and_gradient_are_the_definitions(rows, monkeypatch):
    """A mask that counts for decisions too, parts whose gradients land in other rows, a temperature used once."""
    monkeypatch.setattr(actions, "ROWS", rows)
    made = batch(1)
    found_rows = ActionRows.find(made, TABLE)
    places = torch.cat((found_rows.decisions, found_rows.later))
    assert sorted(places.tolist()) == list(range(4, 12))
    weights = torch.randn(2, 8, generator=torch.Generator().manual_seed(5))
    # More columns than the vocabulary has: padding.
    logits = torch.randn(tiny.SEQ, 104, generator=torch.Generator().manual_seed(4)) * 3
    leaf = logits.clone().requires_grad_()
    scores = score_actions(leaf, found_rows, made.labels, TABLE, VocabShard(0, tiny.VOCAB))
    odds = scores.log_think - scores.log_act
    ((scores.log_probs * weights[0][places - 4]).sum() + (odds * weights[1, : len(odds)]).sum()).backward()

    exact = logits[:, : tiny.VOCAB].double().requires_grad_()
    expected, expected_odds = slow_scores(exact, made.labels)
    ((expected * weights[0]).sum() + (expected_odds * weights[1, : len(odds)]).sum()).backward()
    torch.testing.assert_close(scores.log_probs.double(), expected[places - 4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(odds.double(), expected_odds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaf.grad[:, : tiny.VOCAB].double(), exact.grad, atol=1e-5, rtol=1e-4)
    assert not leaf.grad[:, tiny.VOCAB :].any()
    assert not leaf.grad[torch.tensor([0, 3, 12, 15])].any()


def engine(parallel, components):
    # Weights large enough that the model has opinions.
    settings = tiny.config(model={"vocab_multiple": 8, "layers": "local", "init_std": 0.3})
    return tiny.engine(settings, parallel, components, actions=TABLE)


def slow_log_probs(e, made) -> tuple[Tensor, Tensor]:
    """The engine's model in a plain forward pass: the actions' log-probabilities and the decisions' log-odds."""
    logits = e.chunks[0].module(
        input_ids=made.input_ids[None], position_ids=made.position_ids[None], attention_mask=None
    )
    return slow_scores(logits[0, :, : tiny.VOCAB].double(), made.labels)


@pytest.mark.parametrize("correction", ["clip", "truncate"])
def test_engine_steps_along_the_reference_gradient(parallel, correction):
    """The whole way of an E-step's update: rows, scores, correction, one normaliser for both parts of the gradient."""
    config = PolicyLossConfig(correction=correction, max_importance_weight=1.5)
    e = engine(parallel, [policy_gradient_component(config, 0.7), decision_kl_component(0.9, 0.5)])
    made = [batch(1), batch(2)]
    parameters = list(e.chunks[0].parameters())
    total, gaps, clipped, policy, kl = torch.zeros(()).double(), [], 0, 0.0, 0.0
    for b in made:
        log_probs, odds = slow_log_probs(e, b)
        behaviour, advantages = b.extras["behaviour_log_probs"][4:12].double(), b.extras["advantages"][4:12].double()
        ratio = (log_probs - behaviour).exp()
        if correction == "clip":
            losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
            clipped += int((losses > -advantages * ratio).sum())
        else:
            weight = ratio.detach().clamp(max=1.5)
            # Same gradient as -A w log q; its value is -A w.
            losses = -advantages * weight * (1 + log_probs - log_probs.detach())
            clipped += int((ratio > 1.5).sum())
        think = torch.nn.functional.logsigmoid(odds)
        divergence = bernoulli_kl(Decision(think, torch.nn.functional.logsigmoid(-odds)), 0.9)
        policy, kl = policy + losses.sum().item() / 16, kl + divergence.sum().item() / 16
        total = total + (0.7 * losses.sum() + 0.5 * divergence.sum()) / 16
        gaps.append((log_probs - behaviour).abs().max().item())
    expected = torch.sqrt(sum(g.square().sum() for g in torch.autograd.grad(total, parameters)))
    result = e.train_step(made, step=1)
    assert result.components["policy_gradient"] == pytest.approx(policy, rel=1e-4)
    assert result.components["decision_kl"] == pytest.approx(kl, rel=1e-4)
    assert result.weights == {"policy_gradient": 16.0, "decision_kl": 16.0}
    assert result.monitors["rollout_gap"] == pytest.approx(max(gaps), rel=1e-4)
    assert result.monitors["clipped"] == clipped
    assert 0 < clipped < 16
    assert result.grad_norm == pytest.approx(float(expected), rel=1e-4)


def test_logged_only_component_changes_nothing(parallel):
    """A figure beside the loss that takes part in it, or whose NaN stops the run."""
    results = []
    for components in ([], [code_cross_entropy_component()], [LossComponent("code_cross_entropy", poisoned, 0.0)]):
        e = tiny.engine(tiny.config(), parallel, [cross_entropy_component(), *components])
        made = tiny.batch(1)
        made.weights["code_cross_entropy"] = made.weights["cross_entropy"] * (torch.arange(tiny.SEQ) % 2)
        results.append((e.train_step([made], step=1), tiny.state(e)))
    (plain, weights), *others = results
    for result, state in others:
        assert (result.loss, result.grad_norm, result.skipped) == (plain.loss, plain.grad_norm, False)
        assert all(torch.equal(state[k], v) for k, v in weights.items())
    assert results[1][0].weights["code_cross_entropy"] == 4
    assert results[1][0].components["code_cross_entropy"] != plain.loss


def poisoned(scores, _batch) -> Values:
    return Values(scores.log_probs * torch.nan)


def test_refusals(parallel):
    """Actions without a table, a set of other think tokens, a weight where no action is: not a wrong gradient."""
    policy = policy_gradient_component(PolicyLossConfig())
    with pytest.raises(ValueError, match=r"\['policy_gradient'\] read actions"):
        tiny.engine(tiny.config(), parallel, [policy])
    e = tiny.engine(tiny.config(), parallel, [policy], actions=TABLE)
    with pytest.raises(KeyError, match=r"batch.extras \['think_set', 'thought'\]"):
        e.train_step([tiny.batch(1, "policy_gradient")], step=1)
    made = batch(1)
    made.extras["think_set"] = 9 * THINK_SET
    with pytest.raises(ValueError, match=r"think set 17 .* has 2"):
        e.train_step([made], step=1)
    made = batch(1)
    made.weights["policy_gradient"][12] = 1.0
    with pytest.raises(ValueError, match="neither a decision nor a sampled token"):
        e.train_step([made], step=1)
    with pytest.raises(ValueError, match="unknown correction"):
        PolicyLossConfig(correction="none")
