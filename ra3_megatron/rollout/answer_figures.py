"""What is reported of a step's judged answers: sums that add up over replicas, and the figures made of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.rollout.groups import LOST, AnswerGroup

OUTCOMES = (
    "passed", "wrong", "exception", "missing", "cpu_limit", "wall_limit", "memory", "output", "crashed", "unsafe",
    LOST,
)  # fmt: skip
"""How a program can end (`reward.problem.Outcome`), each counted under `verdict_<outcome>`."""

_NAMES = (
    "groups", "flat", "all_right", "all_wrong", "kept", "answers", "reward", "squares", "passed", "tests", "tokens",
    "nats", "by_length", "by_id", "by_text", *OUTCOMES,
)  # fmt: skip


@dataclass(frozen=True)
class AnswerFigures:
    """Sums over the groups drawn for a step, those left out of the loss included."""

    sums: dict[str, float]
    """By the names in `_NAMES`."""

    @classmethod
    def of(cls, groups: Sequence[AnswerGroup], is_flat: np.ndarray, config: RlvrConfig) -> "AnswerFigures":
        """Of this replica's groups; `is_flat` bool [groups]."""
        s = dict.fromkeys(_NAMES, 0.0)
        for group, flat in zip(groups, is_flat.tolist(), strict=True):
            rewards, right = group.rewards(config), [v.ok for v in group.verdicts]
            s["groups"] += 1
            s["flat"] += flat
            s["kept"] += not flat
            s["all_right"] += bool(right) and all(right)
            s["all_wrong"] += bool(right) and not any(right)
            s["answers"] += len(right)
            s["reward"] += float(rewards.sum())
            s["squares"] += float(np.square(rewards).sum())
            s["tests"] += sum(v.fraction for v in group.verdicts)
            s[LOST] += group.lost
            for answer, verdict in zip(group.answers, group.verdicts, strict=True):
                s[verdict.outcome] += 1
                s["tokens"] += len(answer.ids)
                s["nats"] -= float(answer.log_probs.sum())
                s[{"length": "by_length", "stop_id": "by_id", "stop": "by_text"}[answer.finish]] += 1
        return cls(s)

    def reduced(self, add_up: Callable[[Tensor], Tensor]) -> "AnswerFigures":
        """Over all replicas; `add_up` sums a tensor over them."""
        total = add_up(torch.tensor(list(self.sums.values()), dtype=torch.float64))
        return AnswerFigures(dict(zip(self.sums, total.tolist(), strict=True)))

    def metrics(self) -> dict[str, float]:
        """By their names in the metrics' schema; NaN for a mean of nothing."""
        s = self.sums
        n, tokens, groups = s["answers"], s["tokens"], s["groups"]

        def share(value: float, of: float) -> float:
            return value / of if of else math.nan

        mean = share(s["reward"], n)
        spread = math.sqrt(max(0.0, share(s["squares"], n) - mean * mean)) if n else math.nan
        return {
            "answer_reward": mean,
            "answer_reward_spread": spread,
            "pass_rate": share(s["passed"], n),
            "tests_passed": share(s["tests"], n),
            "groups": round(groups),
            "groups_used": round(s["kept"]),
            "groups_flat": round(s["flat"]),
            "groups_all_right": share(s["all_right"], groups),
            "groups_all_wrong": share(s["all_wrong"], groups),
            "answers": round(n),
            "answer_tokens": share(tokens, n),
            "answer_nats": share(s["nats"], tokens),
            "truncated_answers": share(s["by_length"], n),
            "ended_by_id": share(s["by_id"], n),
            "ended_by_text": share(s["by_text"], n),
            **{f"verdict_{name}": round(s[name]) for name in OUTCOMES},
        }
