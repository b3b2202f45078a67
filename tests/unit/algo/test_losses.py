import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.losses import PolicyLossConfig, cross_entropy, policy_loss, reference_kl


def slow_policy_loss(lp, behaviour, advantage, config, proximal=None):
    """PPO's clipped objective for one token, from its definition."""
    anchor = behaviour if proximal is None else proximal
    ratio = math.exp(lp - anchor)
    clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    objective = min(ratio * advantage, clipped * advantage)
    if config.dual_clip is not None and advantage < 0:
        objective = max(objective, config.dual_clip * advantage)
    weight = 1.0 if proximal is None else min(math.exp(proximal - behaviour), config.max_importance_weight)
    return -objective * weight


def test_hand_computed():
    """Ratio 2 with advantage 1 clips at 1.2; ratio 1/2 with advantage -1 clips at 0.8; on-policy is minus advantage."""
    lp = torch.log(torch.tensor([2.0, 0.5, 1.0]))
    out = policy_loss(lp, torch.zeros(3), torch.tensor([1.0, -1.0, 3.0]), PolicyLossConfig())
    torch.testing.assert_close(out.loss, torch.tensor([-1.2, 0.8, -3.0]))
    assert out.clipped.tolist() == [True, True, False]
    assert cross_entropy(torch.tensor([-2.5])).item() == 2.5


def test_truncated_weights():
    """Weights min(ratio, 2) on the score function: an action whose ratio is clipped by PPO goes on being learned."""
    lp = torch.log(torch.tensor([4.0, 0.5, 1.0])).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 3.0])
    config = PolicyLossConfig(correction="truncate", max_importance_weight=2.0)
    out = policy_loss(lp, torch.zeros(3), advantages, config)
    out.loss.sum().backward()
    torch.testing.assert_close(lp.grad, torch.tensor([-2.0, 0.5, -3.0]))
    torch.testing.assert_close(out.loss.detach(), lp.grad)
    assert out.clipped.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="leave proximal"):
        policy_loss(lp, torch.zeros(3), advantages, config, proximal=torch.zeros(3))


floats = st.floats(-2, 2)


@settings(deadline=None, max_examples=200)
@given(floats, floats, floats, st.none() | floats, st.none() | st.floats(1.5, 5), st.floats(0.05, 0.5))
def test_policy_loss_against_the_slow_reference(lp, behaviour, advantage, proximal, dual, high):
    """Every combination of clip-higher, dual clip and stale rollouts."""
    config = PolicyLossConfig(clip_low=0.2, clip_high=high, dual_clip=dual, max_importance_weight=1.5)
    t = torch.tensor
    out = policy_loss(t([lp]), t([behaviour]), t([advantage]), config, None if proximal is None else t([proximal]))
    assert out.loss.item() == pytest.approx(
        slow_policy_loss(lp, behaviour, advantage, config, proximal), rel=1e-4, abs=1e-5
    )


def test_gradient_is_the_score_function_on_policy():
    """On-policy the gradient in log-probs is minus the advantage; a clipped token has none."""
    lp = torch.tensor([0.0, math.log(2.0)], requires_grad=True)
    policy_loss(lp, torch.zeros(2), torch.tensor([0.7, 1.0]), PolicyLossConfig()).loss.sum().backward()
    torch.testing.assert_close(lp.grad, torch.tensor([-0.7, 0.0]))


def test_importance_weight_carries_no_gradient():
    """A truncated importance weight that let gradient through would bias the estimator."""
    proximal = torch.tensor([0.3], requires_grad=True)
    out = policy_loss(torch.tensor([0.3]), torch.tensor([0.0]), torch.tensor([1.0]), PolicyLossConfig(), proximal)
    assert not out.importance_weight.requires_grad
    assert out.importance_weight.item() == pytest.approx(math.exp(0.3))


def test_kl_estimators_are_unbiased_where_they_claim_to_be():
    """k1 and k3 average to the exact KL over the policy's own distribution; k3 is never negative."""
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    q = torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * reference_kl(p.log(), q.log(), kind)).sum(), exact)
    assert (reference_kl(p.log(), q.log(), "k3") >= 0).all()
    torch.testing.assert_close(reference_kl(p.log(), q.log(), "k2"), 0.5 * (p / q).log() ** 2)
    with pytest.raises(ValueError, match="k9"):
        reference_kl(p.log(), q.log(), "k9")
