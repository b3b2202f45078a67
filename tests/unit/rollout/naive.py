"""Line-by-line rollouts as the paper writes them: one full forward pass per token, no cache, no chunks, no engine."""

from dataclasses import dataclass, field

import numpy as np

from ra3_megatron.data.latent import TagFormat, ThinkTokens
from ra3_megatron.data.tokenizers import train_bpe
from ra3_megatron.data.trajectory import Kind, Trajectory, TrajectoryBuilder
from tests.unit.rollout.conftest import full_log_probs

SOURCE = """
class Stack:
    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        if item is None:
            raise ValueError("nothing to push")
        self.items.append(item)
        return self

    def pop(self):
        for index in range(len(self.items)):
            if self.items[index]:
                return self.items.pop(index)
        return None
"""
TEXTS = [
    SOURCE.lstrip(),
    "def add(a, b):\n    total = a + b\n    return total\n",
    "import os\n\nfor name in os.listdir():\n    if name:\n        print(\n            name,\n        )\n",
    "x = 1\n",
]


def texts_and_tokens(start: bool = True) -> tuple[list[Trajectory], ThinkTokens]:
    """Trajectories of a few snippets under a small tokenizer; the first has a prompt."""
    # Few comments: some deciding tokens are whole openings, some only a part that forces the rest.
    tokenizer = train_bpe([SOURCE * 3, "# a comment\n    ## another\n        ### third\n" * 9, *TEXTS], 320)
    think_tokens = ThinkTokens(tokenizer)
    builder = TrajectoryBuilder(tokenizer, think_tokens, tokenizer.start_id("auto") if start else None)
    prompts = ["'''A stack.'''\n" if start else "", "", "", ""]
    return [builder.build(t, p) for t, p in zip(TEXTS, prompts, strict=True)], think_tokens


def plain_texts_and_tokens() -> tuple[list[Trajectory], ThinkTokens]:
    """Text that is no Python, with thoughts between tags; some lines begin like the opening tag."""
    texts = ["<b>Soup</b>\n\n- cut (the leek\n- boil\n", '<th>one\ntwo\n\n\nthree """\n']
    tokenizer = train_bpe([*texts * 3, "<think>now\n</think>\n" * 3], 290)
    think_tokens = ThinkTokens(tokenizer, TagFormat())
    builder = TrajectoryBuilder(tokenizer, think_tokens, tokenizer.start_id("auto"))
    return [builder.build(text) for text in texts], think_tokens


class OftenThinks:
    """Uniforms whose decisions are scaled down, so that a model that knows nothing thinks now and then."""

    def __init__(self, seed: int, often: float = 0.008) -> None:
        self.seed, self.often = seed, often

    def __call__(self, number: int, member: int, shape: tuple[int, int]) -> np.ndarray:
        uniforms = np.random.default_rng([self.seed, number, member]).random(shape)
        uniforms[:, 0] *= self.often
        return uniforms


@dataclass
class NaiveRollout:
    ids: list[int]
    thoughts: dict[int, list[int]] = field(default_factory=dict)
    p_think: list[float] = field(default_factory=list)
    line_log_probs: list[float] = field(default_factory=list)
    without_thought: list[float] = field(default_factory=list)
    log_act: list[float] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    actions: list[tuple[int, float]] = field(default_factory=list)
    log_allowed: list[float] = field(default_factory=list)


def naive_rollout(chunk, vocab_size, expert, uniforms, temperature, max_latent, think_tokens) -> NaiveRollout:
    """One rollout of `expert`; `uniforms` [lines, 1 + max_latent]."""
    tokenizer = think_tokens.tokenizer
    allowed = np.setdiff1d(np.arange(tokenizer.vocab_size), think_tokens.forbidden_ids)
    prompt = [s for s in expert.segments if s.kind == Kind.PROMPT]
    out = NaiveRollout(expert.ids[: prompt[0].end].tolist() if prompt else [])

    def next_token(ids):
        return full_log_probs(chunk, vocab_size, ids, temperature)[-1].numpy()

    def draw(log_probs, among, uniform):
        weights = np.exp(log_probs[among])
        return int(among[np.searchsorted(weights.cumsum(), uniform * weights.sum(), side="right")]), weights.sum()

    def line_log_prob(before, line_ids):
        """Sum over the line's tokens after `before`, temperature 1; the text's very first token has no prediction."""
        ids = before + line_ids
        scores = full_log_probs(chunk, vocab_size, ids).numpy()
        return sum(scores[i - 1, ids[i]] for i in range(max(1, len(before)), len(ids)))

    decisions = {d.line: d for d in expert.decisions}
    for line in range(expert.num_lines):
        segment = expert.segment(line)
        line_ids = expert.ids[segment.start : segment.end].tolist()
        decision = decisions.get(line)
        out.without_thought.append(np.nan)
        if decision is not None:
            forced = list(decision.forced)
            assert forced == line_ids[: len(forced)]
            at = out.ids + forced
            log_probs = next_token(at)
            think_set = think_tokens[decision.think_set]
            token, p_think = draw(log_probs, think_set.ids, uniforms[line, 1])
            out.p_think.append(p_think)
            if uniforms[line, 0] < p_think:
                out.without_thought[-1] = line_log_prob(out.ids, line_ids) - np.log1p(-p_think)
                out.actions.append((len(at), log_probs[token]))
                out.log_allowed.append(0.0)
                thought = [*forced, token, *think_set.forced_after(token)]
                count = 1
                while token not in think_tokens.closing_ids and count < max_latent:
                    log_probs = next_token(out.ids + thought)
                    token, mass = draw(log_probs, allowed, uniforms[line, 1 + count])
                    out.actions.append((len(out.ids) + len(thought), log_probs[token]))
                    out.log_allowed.append(np.log(mass))
                    thought.append(token)
                    count += 1
                if token not in think_tokens.closing_ids:
                    out.truncated.append(line)
                    thought += tokenizer.encode("\n")
                thought += tokenizer.encode(think_tokens.format.tail)
                out.thoughts[line] = thought
                out.ids += thought
            else:
                out.actions.append((len(at), np.log1p(-p_think)))
                out.log_allowed.append(0.0)
        out.log_act.append(0.0)
        if decision is not None:
            _, p_again = draw(next_token(out.ids + forced), think_set.ids, 0.0)
            out.log_act[-1] = np.log1p(-p_again)
        out.line_log_probs.append(line_log_prob(out.ids, line_ids))
        out.ids = out.ids + line_ids
    return out
