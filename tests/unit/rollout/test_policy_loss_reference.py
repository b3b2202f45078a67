"""The policy loss from judged answers to a number, against TRL's and verl's own on the same tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ra3_megatron.algo.groups import group_advantages
from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.data.batch import collate
from ra3_megatron.rollout.answers import Judged
from ra3_megatron.rollout.groups import AnswerGroup, answer_sequences, components_of, extras_of
from ra3_megatron.stages.rlvr_policy import loss_components
from ra3_megatron.training.actions import TokenScores
from tests.unit.rollout.judged import answer

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "policy_loss_reference.json").read_text())
LONGEST = 12
GROUP = 4


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(REFERENCE["tensors"][name], dtype=torch.float64)


def settings(case: dict[str, Any]) -> RlvrConfig:
    return RlvrConfig(
        aggregation=case["aggregation"],
        correction="decoupled" if case.get("decoupled") else "clip",
        dual_clip=case.get("dual_clip"),
        kl_coefficient=case.get("beta", 0.0),
        max_tokens=LONGEST,
        reward="fraction",
    )


def groups() -> list[AnswerGroup]:
    """The recorded answers: rewards are quarters of four tests, log-probs when sampled are `behaviour`."""
    found = []
    for g in range(len(REFERENCE["lengths"]) // GROUP):
        numbers = range(g * GROUP, (g + 1) * GROUP)
        answers = [
            answer(g, i, n, log_probs=np.array(REFERENCE["tensors"]["behaviour"][i][:n]))
            for i in numbers
            for n in [REFERENCE["lengths"][i]]
        ]
        passed = [round(4 * REFERENCE["tensors"]["rewards"][i]) for i in numbers]
        verdicts = [Judged("passed" if p == 4 else "wrong", p, 4) for p in passed]
        found.append(AnswerGroup.of(g, g, g, answers, verdicts))
    return found


def our_loss(case: dict[str, Any]) -> float:
    """As the engine sums: coefficient x sum(weight x value) / sum(normaliser), over windows that hold all answers."""
    config = settings(case)
    sequences = answer_sequences(groups(), config)
    windows = [sequences[:3], sequences[3:]]
    batch = collate(windows, 128, 0, components=components_of(config), extras=extras_of(config))
    current = torch.full(batch.labels.shape, torch.nan)
    others = {n: torch.zeros(batch.labels.shape) for n in ("proximal", "reference")}
    starts = [window * 128 + sum(len(s.ids) for s in part[:i]) for window, part in enumerate(windows)
              for i in range(len(part))]  # fmt: skip
    for row, (start, n) in enumerate(zip(starts, REFERENCE["lengths"], strict=True)):
        # The label of place i is the token after it; an answer begins behind a prompt of three.
        at = slice(start + 2, start + 2 + n)
        current[at] = tensor("current")[row, :n].float()
        for name, values in others.items():
            values[at] = tensor(name)[row, :n].float()
    if config.correction == "decoupled":
        batch.extras["proximal_log_probs"] = others["proximal"]
    batch.extras["reference_log_probs"] = others["reference"]
    scores = TokenScores(current, current, current, current)
    total = 0.0
    for component in loss_components(RunConfig(rlvr=config)):
        weight = batch.weights[component.weight_key]
        values = component.per_token(scores.counted(weight != 0), batch).loss.double()
        share = torch.where(weight != 0, values * weight, 0.0).sum() / batch.weights[component.normaliser_key].sum()
        total += component.coefficient * float(share)
    return total


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda c: c["name"])
def test_loss_equals_theirs(case: dict[str, Any]) -> None:
    """Clip, dual clip, aggregation, KL or truncated weights in another order than in the papers' own code."""
    assert case["losses"]
    for name, expected in case["losses"].items():
        assert our_loss(case) == pytest.approx(expected, abs=1e-6), name


def test_advantages_equal_theirs() -> None:
    """A deviation with n, or an epsilon inside the root."""
    owner = torch.tensor([g for g in range(2) for _ in range(GROUP)])
    for kind in ("normalised", "centred"):
        found = group_advantages(tensor("rewards"), owner, kind, REFERENCE["epsilon"])  # type: ignore[arg-type]
        torch.testing.assert_close(
            found, torch.tensor(REFERENCE["advantages"][kind], dtype=torch.float64), atol=1e-7, rtol=0
        )


def test_every_clip_acts_on_the_recorded_tensors() -> None:
    """Tensors on which no ratio is clipped would compare nothing."""
    ratio = (tensor("current") - tensor("behaviour")).exp()[tensor("mask") > 0]
    config = PolicyLossConfig(clip_high=0.28)
    assert (ratio > 1 + config.clip_high).sum() > 5
    assert (ratio < 1 - config.clip_low).sum() > 5
    assert (ratio > 3).any()
