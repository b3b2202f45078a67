"""Loss components: the engine's loss is their sum, each normalised by its own global token weight.

The engine knows no algorithm. A component names the token weights it reads from the batch and computes one number per
token; supervised training, the E-step and RLVR differ in their components and in the weights of their batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ra3_megatron.algo.losses import PolicyLossConfig, cross_entropy, policy_loss, reference_kl
from ra3_megatron.data.batch import TrainBatch

PerToken = Callable[[Tensor, TrainBatch], Tensor]
"""`(log_probs [tokens] fp32, batch) -> [tokens] fp32`."""


@dataclass(frozen=True)
class LossComponent:
    """One term of the loss: coefficient x sum(weight x per-token value) / global sum(weight)."""

    name: str
    """Key of the token weights in `TrainBatch.weights`; also the name in logs."""
    per_token: PerToken
    """Value of every token, from its log-probability and the batch."""
    coefficient: float = 1.0
    """Factor in the total loss."""


def _extra(batch: TrainBatch, name: str, component: str) -> Tensor:
    try:
        return batch.extras[name]
    except KeyError:
        raise KeyError(
            f"loss component '{component}' needs batch.extras['{name}']; the batch has {sorted(batch.extras)}"
        ) from None


def cross_entropy_component(coefficient: float = 1.0) -> LossComponent:
    """Next-token cross-entropy on the tokens weighted under `cross_entropy`, nats."""
    return LossComponent("cross_entropy", lambda log_probs, _: cross_entropy(log_probs), coefficient)


def _policy_per_token(config: PolicyLossConfig, log_probs: Tensor, batch: TrainBatch) -> Tensor:
    return policy_loss(
        log_probs,
        behaviour=_extra(batch, "behaviour_log_probs", "policy_gradient"),
        advantages=_extra(batch, "advantages", "policy_gradient"),
        config=config,
        proximal=batch.extras.get("proximal_log_probs"),
    ).loss


def policy_gradient_component(config: PolicyLossConfig, coefficient: float = 1.0) -> LossComponent:
    """Clipped policy gradient on the tokens weighted under `policy_gradient`.

    Reads `behaviour_log_probs`, `advantages` and, when present, `proximal_log_probs` from the batch's extras, all
    [tokens] and aligned with the labels.
    """
    return LossComponent("policy_gradient", partial(_policy_per_token, config), coefficient)


def _kl_per_token(estimator: str, log_probs: Tensor, batch: TrainBatch) -> Tensor:
    return reference_kl(log_probs, _extra(batch, "reference_log_probs", "reference_kl"), estimator)


def reference_kl_component(coefficient: float, estimator: str = "k3") -> LossComponent:
    """KL to a reference model on the tokens weighted under `reference_kl`; reads `reference_log_probs`."""
    return LossComponent("reference_kl", partial(_kl_per_token, estimator), coefficient)
