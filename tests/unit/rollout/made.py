"""Rollouts without a model: random thoughts and figures on real trajectories."""

import dataclasses
from functools import cache

import numpy as np

from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Kind, Trajectory, splice
from ra3_megatron.rollout.interleaved import Rollout
from tests.unit.rollout.naive import texts_and_tokens

texts_and_tokens = cache(texts_and_tokens)


def made_rollout(
    expert: Trajectory,
    think_tokens: ThinkTokens,
    seed: int,
    number: int = 0,
    member: int = 0,
    version: int = 0,
    rate: float = 0.4,
) -> Rollout:
    """A rollout as the sampler would describe it: positions of actions agree with the spliced ids."""
    chance = np.random.default_rng([seed, number, member])
    decisions = tuple(d for d in expert.decisions if chance.random() < 0.9)
    think = np.array([chance.random() < rate for _ in decisions], dtype=bool)
    tokenizer = think_tokens.tokenizer
    thoughts, actions, counts = {}, [], {}
    for d, has in zip(decisions, think, strict=True):
        if has:
            think_set = think_tokens[d.think_set]
            first = int(chance.choice(think_set.ids))
            inside = tokenizer.encode(" note " * int(chance.integers(1, 3)))
            start = [*d.forced, first, *think_set.forced_after(first)]
            thoughts[d.line] = [*start, *inside, *tokenizer.encode("\n")]
            counts[d.line] = (len(start), len(inside) + 1)
    infused = splice(dataclasses.replace(expert, decisions=decisions), thoughts)
    for d in infused.decisions:
        actions.append(d.position)
        if d.line in counts:
            segment = infused.segment(d.line, Kind.THOUGHT)
            start, rest = counts[d.line]
            actions += range(segment.start + start, segment.start + start + rest)
    n, lines = len(actions), expert.num_lines
    line_log_probs = -3 * chance.random(lines) - 0.1
    with_thought = np.isin(np.arange(lines), list(thoughts))
    later = ~np.isin(actions, [d.position for d in infused.decisions])
    log_allowed = np.where(later, -0.1 * chance.random(n), 0.0)
    return Rollout(
        number=number,
        member=member,
        trajectory=infused,
        line_log_probs=line_log_probs,
        without_thought=np.where(with_thought, line_log_probs - chance.normal(size=lines), np.nan),
        log_act=-0.2 * chance.random(lines),
        p_think=chance.uniform(0.05, 0.95, len(decisions)),
        thought=think,
        positions=np.array(actions, dtype=np.int64),
        log_probs=-2 * chance.random(n) + log_allowed,
        log_allowed=log_allowed,
        truncated=tuple(list(thoughts)[:1]),
        not_offered=len(expert.decisions) - len(decisions),
        temperature=1.0,
        weights_version=version,
    )
