"""Losses of TRL and verl on fixed tensors, for `tests/unit/rollout/test_policy_loss_reference.py`.

Run with released versions of both installed (they are no dependency of this project); their own functions are called:

    pip install --no-deps trl==1.16.0 verl==0.9.1     # in an environment with torch, transformers, and what they import
    python benchmarks/policy_loss_reference.py tests/data/policy_loss_reference.json

TRL: `GRPOTrainer._compute_loss` with the model's log-probs given. verl: `compute_policy_loss_vanilla` and
`compute_grpo_outcome_advantage` of `verl.trainer.ppo.core_algos`.
"""

import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

LENGTHS = (7, 3, 12, 1, 9, 12, 5, 8)
"""Tokens of each answer; two groups of four."""
LONGEST = 12
CASES: tuple[dict[str, Any], ...] = (
    {"name": "grpo", "aggregation": "sequence_mean", "trl": "grpo", "verl": "seq-mean-token-mean"},
    {"name": "dapo", "aggregation": "token_mean", "trl": "dapo", "verl": "token-mean"},
    {"name": "dr_grpo", "aggregation": "constant", "trl": "dr_grpo", "verl": "seq-mean-token-sum-norm"},
    {"name": "grpo_kl", "aggregation": "sequence_mean", "trl": "grpo", "beta": 0.04},
    {"name": "dapo_kl", "aggregation": "token_mean", "trl": "dapo", "beta": 0.04},
    {"name": "dual_clip", "aggregation": "token_mean", "verl": "token-mean", "dual_clip": 3.0},
    {"name": "decoupled", "aggregation": "token_mean", "verl": "token-mean", "decoupled": True},
)


def tensors() -> dict[str, torch.Tensor]:
    """Log-probs that differ enough for every clip to act."""
    g = torch.Generator().manual_seed(4)
    shape = (len(LENGTHS), LONGEST)
    current = -torch.rand(shape, generator=g, dtype=torch.float64) * 3
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS).unsqueeze(1)).double()
    return {
        "current": current,
        "behaviour": current + 0.6 * torch.randn(shape, generator=g, dtype=torch.float64),
        "proximal": current + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64),
        "reference": current + 0.4 * torch.randn(shape, generator=g, dtype=torch.float64),
        "mask": mask,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.25], dtype=torch.float64),
    }


def trl_loss(case: dict[str, Any], t: dict[str, torch.Tensor], advantages: torch.Tensor) -> float:
    """TRL's own loss with everything but the log-probs out of the way."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    beta = case.get("beta", 0.0)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (t["current"], torch.zeros_like(t["current"]), None),
        accelerator=accelerator,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        loss_type=case["trl"],
        max_completion_length=LONGEST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(t["mask"].shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": t["mask"],
        "advantages": advantages,
        "old_per_token_logps": t["behaviour"],
        "ref_per_token_logps": t["reference"],
        "num_items_in_batch": t["mask"].sum(),
    }
    return float(GRPOTrainer._compute_loss(trainer, None, inputs))


def verl_loss(case: dict[str, Any], t: dict[str, torch.Tensor], advantages: torch.Tensor) -> float:
    """verl's own loss."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    class Config(dict):
        clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.2, 0.28
        global_batch_info: ClassVar[dict[str, Any]] = {}

    # verl's dual clip is on unless its bound is out of reach.
    config = Config(clip_ratio_c=case.get("dual_clip", 1e9))
    old, weights = t["behaviour"], None
    if case.get("decoupled"):
        old, weights = t["proximal"], torch.exp(t["proximal"] - t["behaviour"]).clamp(max=2.0)
    loss, _ = compute_policy_loss_vanilla(
        old, t["current"], advantages.unsqueeze(1) * t["mask"], t["mask"], case["verl"], config, weights
    )
    return float(loss)


def advantages_of(t: dict[str, torch.Tensor], by_std: bool, epsilon: float) -> torch.Tensor:
    """verl's own advantages."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards = torch.zeros_like(t["mask"])
    rewards[:, 0] = t["rewards"]
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found, _ = compute_grpo_outcome_advantage(rewards, torch.ones_like(t["mask"]), groups, epsilon, by_std)
    return found[:, 0]


def main() -> None:
    t = tensors()
    normalised = advantages_of(t, True, 1e-4)
    out: dict[str, Any] = {
        "versions": {name: version(name) for name in ("trl", "verl", "torch")},
        "lengths": LENGTHS,
        "epsilon": 1e-4,
        "tensors": {name: value.tolist() for name, value in t.items()},
        "advantages": {"normalised": normalised.tolist(), "centred": advantages_of(t, False, 1e-4).tolist()},
        "cases": [],
    }
    for case in CASES:
        losses = {}
        if "trl" in case:
            losses["trl"] = trl_loss(case, t, normalised)
        if "verl" in case:
            losses["verl"] = verl_loss(case, t, normalised)
        out["cases"].append({**case, "losses": losses})
    Path(sys.argv[1]).write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out["cases"], indent=1))


if __name__ == "__main__":
    main()
