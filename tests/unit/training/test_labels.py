"""Components that read labels: at which temperature, divided by what; against log_softmax over the whole vocabulary."""

from dataclasses import replace

import pytest
import torch

from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.model.factory import unwrap
from ra3_megatron.rollout.scoring import score_labels
from ra3_megatron.training import engine as training_engine
from ra3_megatron.training.components import (
    LossComponent,
    Values,
    cross_entropy_component,
    policy_gradient_component,
    reference_kl_component,
)
from tests.unit.training import tiny

CONFIG = PolicyLossConfig(clip_low=0.2, clip_high=0.28)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    behaviour = -4.6 + 0.3 * torch.randn(tiny.SEQ, generator=g)
    extras = {
        "behaviour_log_probs": behaviour,
        "advantages": torch.randn(tiny.SEQ, generator=g),
        "reference_log_probs": behaviour + 0.1,
    }
    made = tiny.batch(seed, "policy_gradient", **extras)
    budget = torch.zeros(tiny.SEQ)
    budget[0] = 20.0
    more = {"cross_entropy": made.weights["policy_gradient"].flip(0).clone(), "budget": budget}
    return replace(made, weights=made.weights | more | {"reference_kl": made.weights["policy_gradient"]})


def logits_of(engine, made):
    """[tokens, vocabulary] with a gradient to the parameters, without the engine's schedule."""
    output = engine.chunks[0](
        input_ids=made.input_ids.unsqueeze(0), position_ids=made.position_ids.unsqueeze(0), attention_mask=None
    )
    return output[0, :, : tiny.VOCAB].double()


def log_probs_of(logits, made, temperature):
    return (logits / temperature).log_softmax(-1).gather(1, made.labels.unsqueeze(1))[:, 0]


def slow_policy_loss(log_probs, made):
    """[tokens] Eq. 7 of PPO with two bounds, one token at a time."""
    out = []
    for current, old, advantage in zip(
        log_probs, made.extras["behaviour_log_probs"], made.extras["advantages"], strict=True
    ):
        ratio = (current - old.double()).exp()
        out.append(-min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage))
    return torch.stack(out)


def engine_of(parallel, components, temperature):
    return tiny.engine(tiny.config(), parallel, components, label_temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_each_component_reads_its_temperature(parallel, temperature):
    """A policy sampled at 0.6 was trained at 1 (trl#4159); cross-entropy beside it changed with the temperature."""
    components = [
        cross_entropy_component(0.5),
        policy_gradient_component(CONFIG, 1.0, reads="labels"),
        reference_kl_component(0.1),
    ]
    engine, made = engine_of(parallel, components, temperature), batch()
    logits = logits_of(engine, made)
    at_one, at_its_own = log_probs_of(logits, made, 1.0), log_probs_of(logits, made, temperature)
    w = made.weights
    log_ratio = at_its_own - made.extras["reference_log_probs"]
    expected = {
        "cross_entropy": -(at_one * w["cross_entropy"]).sum() / 8,
        "policy_gradient": (slow_policy_loss(at_its_own, made) * w["policy_gradient"]).sum() / 8,
        "reference_kl": (((-log_ratio).exp() - 1 + log_ratio) * w["reference_kl"]).sum() / 8,
    }
    found = engine.evaluate([made])
    assert found.components == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)
    (scores,) = score_labels(engine.chunks, engine.architecture, parallel, [made], temperature)
    torch.testing.assert_close(scores, at_its_own.float(), rtol=0, atol=1e-5)
    total = 0.5 * expected["cross_entropy"] + expected["policy_gradient"] + 0.1 * expected["reference_kl"]
    parameters = [p for p in engine.chunks[0].parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters)
    engine.train_step([made], step=1)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scale = min(1.0, engine.config.optimizer.clip_grad / float(norm))  # the engine has clipped its own
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient * scale, rtol=1e-4, atol=1e-6)


def test_one_temperature_costs_no_copy_of_the_logits(parallel, monkeypatch):
    """[tokens, vocabulary] is the largest tensor of a step: a second one lowered the batch that fits."""
    seen = []

    def watched(logits, *args, consume):
        seen.append(consume)
        before = logits.data_ptr()
        out = original(logits, *args, consume=consume)
        assert logits.data_ptr() == before
        return out

    original = training_engine.token_log_probs
    monkeypatch.setattr(training_engine, "token_log_probs", watched)
    engine = engine_of(parallel, [policy_gradient_component(CONFIG, reads="labels"), reference_kl_component(0.1)], 0.6)
    engine.train_step([batch()], step=1)
    assert seen == [True]


def test_consumed_logits_hold_the_result(parallel):
    """Dividing by the temperature made the copy that `consume` is there to avoid."""
    logits = torch.randn(5, 11)
    labels, kept = torch.arange(5), logits.clone()
    found = token_log_probs(logits, labels, VocabShard(0, 11), 0.5, consume=True)
    torch.testing.assert_close(found, (kept / 0.5).log_softmax(-1).gather(1, labels.unsqueeze(1))[:, 0])
    torch.testing.assert_close(logits, (kept / 0.5 - (kept / 0.5).amax(1, keepdim=True)).exp())


def test_a_normaliser_of_its_own(parallel):
    """Dr.GRPO divides by a budget of tokens; divided by the tokens that count, long answers pay less."""
    mean = policy_gradient_component(CONFIG, reads="labels")
    engine, made = engine_of(parallel, [mean, replace(mean, name="budgeted", weights="policy_gradient",
        normaliser="budget", sums=(), maxima=())], 1.0), batch()  # fmt: skip
    found = engine.evaluate([made, batch(1)])
    assert found.weights == {"policy_gradient": 16.0, "budgeted": 16.0}
    assert found.components["budgeted"] == pytest.approx(found.components["policy_gradient"] * 16 / 40, rel=1e-6)
    made.weights["budget"].zero_()
    with pytest.raises(ValueError, match="normaliser 'budget'"):
        engine.evaluate([made])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logits_of_tokens_that_count(parallel, tied, temperature):
    """The output layer ran on prompts too, whose labels are in no loss; rows that slip change the gradient."""
    made = [batch(0), batch(1)]
    made[1] = replace(made[1], weights={k: torch.zeros_like(v) for k, v in made[1].weights.items()})
    everything = [replace(b, weights=b.weights | {"all": torch.ones(tiny.SEQ)}) for b in made]
    components = [policy_gradient_component(CONFIG, reads="labels"), reference_kl_component(0.1)]
    seen, results, weights = [], [], []

    def value(scores, _):
        seen.append(len(scores.log_probs))
        return Values(-scores.log_probs)

    for batches, more in ((everything, [LossComponent("all", value, 0.0)]), (made, [])):
        engine = tiny.engine(tiny.config(), parallel, components + more, tied, label_temperature=temperature)
        unwrap(engine.chunks[0]).output_layer.register_forward_hook(lambda _m, x, _o: seen.append(len(x[0])))
        results.append(engine.train_step(batches, step=1))
        weights.append(tiny.state(engine))
    # Of the second micro-batch, in which nothing counts, one row, for the sake of its backward pass.
    assert seen == [tiny.SEQ] * 4 + [8, 1]
    whole, some = results
    assert some.components == pytest.approx({k: whole.components[k] for k in some.components}, rel=1e-6)
    assert some.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
    assert some.monitors == pytest.approx(whole.monitors, rel=1e-6)
    for name, value_ in weights[0].items():
        torch.testing.assert_close(weights[1][name], value_, rtol=1e-4, atol=1e-6, msg=name)


def test_temperature_of_a_component_is_its_own(parallel):
    """A logged figure at another temperature took the memory that the loss had yet to read."""
    seen = {}

    def keep(name):
        def value(scores, _):
            seen[name] = scores.log_probs.detach().clone()
            return Values(-scores.log_probs)

        return value

    components = [
        LossComponent("a", keep("a"), 1.0, weights="policy_gradient", temperature=2.0),
        LossComponent("b", keep("b"), 0.0, weights="policy_gradient", temperature=0.5),
        LossComponent("c", keep("c"), 1.0, weights="policy_gradient"),
    ]
    engine, made = engine_of(parallel, components, 0.7), batch()
    logits = logits_of(engine, made).detach()
    engine.train_step([made], step=1)
    for name, temperature in (("a", 2.0), ("b", 0.5), ("c", 0.7)):
        expected = log_probs_of(logits, made, temperature).float()[made.weights["policy_gradient"] != 0]
        torch.testing.assert_close(seen[name], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="label_temperature"):
        engine_of(parallel, components, 0.0)
