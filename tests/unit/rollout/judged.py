"""Made answers and groups."""

import numpy as np

from ra3_megatron.rollout.answers import Judged
from ra3_megatron.rollout.completion import Completion, Prompt
from ra3_megatron.rollout.groups import AnswerGroup


def answer(position: int, member: int, length: int, seed: int = 0, finish: str = "stop_id", version: int = 0, **fields):
    """An answer of `length` random ids after a prompt of three."""
    chance = np.random.default_rng([seed, position, member])
    prompt = Prompt(chance.integers(0, 90, 3).astype(np.int32), position, member)
    ids = chance.integers(0, 90, length).astype(np.int32)
    values = {"log_probs": -chance.random(length) * 3, "text_bytes": length, **fields}
    return Completion(prompt, ids, finish=finish, temperature=1.0, weights_version=version, **values)


def verdict(right: bool | None, passed: int = 0, total: int = 4) -> Judged:
    """Right, wrong, or (None) lost."""
    if right is None:
        return Judged("lost", 0, total)
    return Judged("passed", total, total) if right else Judged("wrong", passed, total, "assert 1 == 2")


def group(position: int, rights: list[bool | None], lengths: list[int] | None = None, **fields) -> AnswerGroup:
    """A group of answers that are right, wrong or lost."""
    lengths = lengths or [4 + i for i in range(len(rights))]
    answers = [answer(position, m, n, **fields) for m, n in enumerate(lengths)]
    return AnswerGroup.of(position, position, position, answers, [verdict(r) for r in rights])
