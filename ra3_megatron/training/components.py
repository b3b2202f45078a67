"""Loss components: the engine's loss is their sum, each normalised by its own global token weight.

The engine knows no algorithm. A component names the token weights it reads from the batch and computes one number per
token; supervised training, the E-step and RLVR differ in their components and in the weights of their batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.elbo import bernoulli_kl
from ra3_megatron.algo.losses import PolicyLossConfig, cross_entropy, policy_loss, reference_kl
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.training.actions import ACTION, THINK_SET, TokenScores


@dataclass(frozen=True)
class Values:
    """What a component computes per token, with figures on the side."""

    loss: Tensor
    """[labels] fp32."""
    monitors: dict[str, Tensor] = field(default_factory=dict)
    """[labels] per name in the component's `sums` and `maxima`; no gradient flows through them."""


PerToken = Callable[[TokenScores, TrainBatch], Values]
"""What a component computes from the scores of a micro-batch's labels; the engine leaves out those that have no weight
under any component (`schedule.at_rows`)."""


@dataclass(frozen=True)
class LossComponent:
    """One term of the loss: coefficient x sum(weight x per-token value) / global sum(weight of `normaliser`).

    With coefficient 0 it is logged only: nothing of it is kept for the backward pass.
    """

    name: str
    """Name in results and logs; also the key of its token weights, unless `weights` says another."""
    per_token: PerToken
    """Values of every token. Where the weight is 0 the scores are 0 and the values are ignored."""
    coefficient: float = 1.0
    """Factor in the total loss."""
    reads: Literal["labels", "actions"] = "labels"
    """Which scores it uses: `log_probs`, or all the others of `TokenScores`. What nobody reads is not computed."""
    weights: str = ""
    """Key of the token weights in `TrainBatch.weights`; empty = `name`."""
    normaliser: str = ""
    """Key of the weights whose global sum divides, for a term that is not a mean over its tokens (Dr.GRPO's budget of
    tokens); empty = the component's own. They may lie on any rows."""
    temperature: float | None = None
    """The labels' log-probabilities are read at this one; none = the engine's `label_temperature`."""
    sums: tuple[str, ...] = ()
    """Monitors that are summed over all tokens with weight."""
    maxima: tuple[str, ...] = ()
    """Monitors, of values >= 0, whose largest value over all tokens with weight is kept; 0 where none has."""

    @property
    def weight_key(self) -> str:
        """Key of the token weights in `TrainBatch.weights`."""
        return self.weights or self.name

    @property
    def normaliser_key(self) -> str:
        """Key of the weights whose global sum divides."""
        return self.normaliser or self.weight_key


def _extra(batch: TrainBatch, name: str, component: str) -> Tensor:
    try:
        return batch.extras[name]
    except KeyError:
        raise KeyError(
            f"loss component '{component}' needs batch.extras['{name}']; the batch has {sorted(batch.extras)}"
        ) from None


def _cross_entropy(scores: TokenScores, _: TrainBatch) -> Values:
    return Values(cross_entropy(scores.log_probs))


def cross_entropy_component(coefficient: float = 1.0) -> LossComponent:
    """Next-token cross-entropy on the tokens weighted under `cross_entropy`, nats, at temperature 1 always."""
    return LossComponent("cross_entropy", _cross_entropy, coefficient, temperature=1.0)


def code_cross_entropy_component() -> LossComponent:
    """Next-token cross-entropy on code alone (weights `code_cross_entropy`), nats; logged only."""
    return LossComponent("code_cross_entropy", _cross_entropy, 0.0, temperature=1.0)


def _policy_gradient(config: PolicyLossConfig, reads: str, scores: TokenScores, batch: TrainBatch) -> Values:
    log_probs = scores.action_log_probs if reads == "actions" else scores.log_probs
    behaviour = _extra(batch, "behaviour_log_probs", "policy_gradient")
    result = policy_loss(
        log_probs,
        behaviour=behaviour,
        advantages=_extra(batch, "advantages", "policy_gradient"),
        config=config,
        proximal=batch.extras.get("proximal_log_probs"),
    )
    return Values(
        result.loss,
        {"clipped": result.clipped.float(), "rollout_gap": (log_probs.detach() - behaviour).abs()},
    )


def policy_gradient_component(
    config: PolicyLossConfig, coefficient: float = 1.0, reads: Literal["labels", "actions"] = "actions"
) -> LossComponent:
    """Policy gradient on the tokens weighted under `policy_gradient`, clipped or truncated.

    Of RA3's `actions` (the engine needs an `ActionTable`), or of the `labels` themselves, which a plain language-model
    policy draws at the engine's `label_temperature`. Reads `behaviour_log_probs`, `advantages` and, when present,
    `proximal_log_probs` from the batch's extras, all [tokens], aligned with the labels and at that temperature.
    Monitors: `clipped`, number of actions whose ratio was clipped or weight truncated; `rollout_gap`, largest
    |current - behaviour| log-probability, nats.
    """
    per_token = partial(_policy_gradient, config, reads)
    return LossComponent(ACTION, per_token, coefficient, reads, sums=("clipped",), maxima=("rollout_gap",))


def _decision_kl(stay: float, scores: TokenScores, batch: TrainBatch) -> Values:
    decides = _extra(batch, THINK_SET, "decision_kl") != 0
    zero = torch.zeros((), device=decides.device)
    decision = Decision(torch.where(decides, scores.log_think, zero), torch.where(decides, scores.log_act, zero))
    return Values(torch.where(decides, bernoulli_kl(decision, stay), zero))


def decision_kl_component(stay: float, coefficient: float = 1.0) -> LossComponent:
    """KL(Bern(q(act)) || Bern(stay)) of every decision, nats: the part of the bound's gradient that rewards lack.

    Weighted under `policy_gradient`, and so divided by the number of actions: its gradient is then of the same scale as
    that of the policy gradient, of which it is a part (see `algo/elbo.latent_cost`; Prop. 5.1 of the paper). The
    reported value is per action. Tokens of thoughts that decide nothing add 0.
    """
    return LossComponent("decision_kl", partial(_decision_kl, stay), coefficient, "actions", weights=ACTION)


def _reference_kl(estimator: str, scores: TokenScores, batch: TrainBatch) -> Values:
    return Values(reference_kl(scores.log_probs, _extra(batch, "reference_log_probs", "reference_kl"), estimator))


def reference_kl_component(coefficient: float, estimator: str = "k3") -> LossComponent:
    """KL to a reference model on the tokens weighted under `reference_kl`; reads `reference_log_probs`, which must be
    at the engine's `label_temperature`."""
    return LossComponent("reference_kl", partial(_reference_kl, estimator), coefficient)
