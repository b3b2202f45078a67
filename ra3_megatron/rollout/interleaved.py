"""Interleaved RA3 rollouts: the expert's lines are forced in, thoughts between them are decided and sampled.

Line by line this would be one forward pass per token. Instead a chunk of the coming expert tokens is forced in at once
and every decision in it is read and drawn: up to the first `think` this is what line-by-line sampling does, since the
text up to there is the same. The row is then shortened to that decision, the thought is sampled, and the next chunk
follows. The same random numbers give the same rollouts for any chunk size, batch and number of processes. A chunk ends
with a line, so a line that gets a thought has been scored without it before.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Decision, Kind, Trajectory, splice
from ra3_megatron.rollout.engine import Answer, Extend, Query, RolloutEngine
from ra3_megatron.rollout.party import Party

FIRST_CHUNK = 16
"""About the size of a row's first chunk, tokens: how long it goes without a thought is not known yet."""


@dataclass(frozen=True)
class RolloutSettings:
    """How thoughts are sampled, and how much is forced in at once."""

    temperature: float = 1.0
    """Divides the logits of decisions and thoughts; > 0."""
    max_latent_tokens: int = 32
    """Sampled tokens of a thought, the deciding one included; a longer thought is ended by force."""
    chunk_tokens: int = 64
    """Most expert tokens of a row forced in by one forward pass, but always whole lines and at least one; no effect on
    the results. Fewer waste fewer tokens behind a thought, more need fewer passes; a row's chunks are smaller while its
    thoughts are frequent."""


class Uniforms(Protocol):
    """Where the random numbers of a rollout come from."""

    def __call__(self, number: int, member: int, shape: tuple[int, int]) -> np.ndarray:
        """Numbers in [0, 1), float64 `shape` = [lines, 1 + max_latent_tokens], of one rollout.

        Column 0 makes a line's decision, column 1 draws the deciding token of its thought, the others the next ones.
        """


@dataclass(frozen=True)
class SeededUniforms:
    """Random numbers by (seed, id of the trajectory, member of the group), whatever else is in the batch."""

    seed: int
    """Of the round."""
    ids: Sequence[int]
    """Id of every trajectory of the call, unique in the data set."""

    def __call__(self, number: int, member: int, shape: tuple[int, int]) -> np.ndarray:
        """See `Uniforms`."""
        return np.random.default_rng([self.seed, self.ids[number], member]).random(shape)


@dataclass(frozen=True)
class Rollout:
    """One rollout of one trajectory, all the update needs to know.

    Sampled tokens and decisions are the actions of the policy q. An action lies at `positions[i]` of the infused ids:
    a sampled token there, or the token with which the line began when the decision was to go on. Forced tokens of a
    thought (its prefix, an end put by force) are no actions.
    """

    number: int
    """Which trajectory of the call."""
    member: int
    """Which rollout of its group."""
    trajectory: Trajectory = field(repr=False)
    """With its thoughts; decisions that were not offered are left out."""
    line_log_probs: np.ndarray = field(repr=False)
    """float64 [lines]: log-likelihood of every expert line after its thought, sum over its tokens, nats, temperature
    1. The very first token of a text without start token or prompt has none and counts 0."""
    without_thought: np.ndarray = field(repr=False)
    """float64 [lines]: log p(line | act) of a line with a thought, had it none: after the same earlier latents, and
    given that no thought begins (which `line_log_probs` are not); NaN for lines without a thought."""
    log_act: np.ndarray = field(repr=False)
    """float64 [lines]: log-probability, after temperature, that no (further) thought begins where the line's own tokens
    do, read as the line was last forced in, so after its thought. A part of `line_log_probs` that says nothing about
    the code; 0 for lines that no thought can precede."""
    p_think: np.ndarray = field(repr=False)
    """float64 [decisions]: probability of a thought, after temperature, aligned with `trajectory.decisions`."""
    thought: np.ndarray = field(repr=False)
    """bool [decisions]: whether there is one."""
    positions: np.ndarray = field(repr=False)
    """int64 [actions], rising."""
    log_probs: np.ndarray = field(repr=False)
    """float64 [actions], nats, after temperature, over the whole vocabulary: log(1 - p_think) where the decision was
    to go on, the token's log-probability elsewhere. What the trainer computes for the same tokens."""
    log_allowed: np.ndarray = field(repr=False)
    """float64 [actions], nats: log of the mass of the ids allowed inside a thought; `log_probs - log_allowed` is the
    log-probability with which the action was really drawn. 0 for decisions and deciding tokens."""
    truncated: tuple[int, ...]
    """Lines whose thought was ended by force."""
    not_offered: int
    """Decisions left out because a thought might not have fitted into `max_tokens`."""
    temperature: float
    """Of the actions."""
    weights_version: int
    """Of the weights that sampled."""

    @property
    def gains(self) -> np.ndarray:
        """float64 [lines]: log p(line | its thought) - log p(line | act), nats; NaN for lines without a thought.

        Both are given the decision: what the model makes of the choice to think or not is in neither.
        """
        return self.line_log_probs - self.log_act - self.without_thought


class ThoughtRules:
    """Sets of ids of one engine and format: what decides for a thought, what may stand in it, what ends it.

    `closing`: ids that end a thought's content; `tail`: ids that follow them by force; `ending`: ids put by force where
    the content became too long, the tail included.
    """

    def __init__(self, engine: RolloutEngine, think_tokens: ThinkTokens) -> None:
        self._engine, self._think_tokens = engine, think_tokens
        self._numbers: dict[int, int] = {}
        self.closing = frozenset(think_tokens.closing_ids.tolist())
        self.tail, self.ending = think_tokens.tail_ids, think_tokens.ending_ids

    @cached_property
    def allowed(self) -> int:
        """Set of the ids that may follow inside a thought."""
        every = np.arange(self._think_tokens.tokenizer.vocab_size)
        return self._engine.token_set(np.setdiff1d(every, self._think_tokens.forbidden_ids))

    def deciding(self, think_set: int) -> int:
        """Set of the ids that decide for a thought."""
        if think_set not in self._numbers:
            self._numbers[think_set] = self._engine.token_set(self._think_tokens[think_set].ids)
        return self._numbers[think_set]

    def completion(self, think_set: int) -> tuple[int, ...]:
        """Longest run of ids that may follow a deciding token of this set by force."""
        return self._think_tokens[think_set].completion

    def forced_after(self, think_set: int, token: int) -> tuple[int, ...]:
        """Ids that follow the deciding `token` by force."""
        return self._think_tokens[think_set].forced_after(token)


def _log_act(log_mass: float) -> float:
    """log(1 - p_think) from log p_think, finite: the logits do not tell 1 - 1e-9 from 1."""
    return float(np.log1p(-min(np.exp(log_mass), 1 - 1e-9)))


class _Walk:
    """One rollout on its way: what its row is extended by next, and what the answer means.

    `_ids` is what the row holds, `_carry` what must come next by force, `_at` the expert token after that. It opens a
    row of its own unless it is given one; where that is `shared` with others, a thought begins on a copy of it.
    """

    def __init__(
        self,
        place: tuple[int, int],
        expert: Trajectory,
        uniforms: np.ndarray,
        rules: ThoughtRules,
        settings: RolloutSettings,
        engine: RolloutEngine,
        row: int | None = None,
    ) -> None:
        self.place, self.expert, self.uniforms = place, expert, uniforms
        self.rules, self.settings, self.engine = rules, settings, engine
        first = expert.segments[0]
        self._at = first.end if first.kind == Kind.PROMPT else 1
        self._ids: list[int] = expert.ids[: self._at].tolist()
        self.row = engine.open(self._ids) if row is None else row
        self.shared = row is not None
        code = [s for s in expert.segments if s.kind == Kind.CODE]
        self._starts, self._ends = [s.start for s in code], [s.end for s in code]
        self._carry: list[int] = []
        self._next_decision = 0
        self._in_chunk: list[Decision] = []
        self._line: int | None = None  # of the thought that is being sampled
        self._begin = self._sampled = 0
        self._token_log_probs = np.zeros(len(expert.ids))
        self._without_thought = np.full(expert.num_lines, np.nan)
        self._log_act = np.zeros(expert.num_lines)
        self._reread: Decision | None = None  # of the line after a thought that has just ended
        self._offered: list[Decision] = []
        self._p_think: list[float] = []
        self._actions: list[tuple[int, float, float]] = []
        self._thoughts: dict[int, list[int]] = {}
        self._truncated: list[int] = []

    @property
    def done(self) -> bool:
        """Whether the whole text is there."""
        return self._line is None and self._at == len(self.expert.ids)

    def extend(self) -> Extend:
        """What the row needs next."""
        offset = len(self._carry)
        if self._line is not None:
            uniform = float(self.uniforms[self._line, 1 + self._sampled])
            return Extend(self.row, self._carry, [Query(offset, self.rules.allowed, uniform)], append=True)
        end = self._chunk_end()
        self._in_chunk = []
        # Nothing is drawn where a thought has just ended; the line's likelihood given that no other follows is wanted.
        again = [] if self._reread is None else [self._reread]
        for decision in self.expert.decisions[self._next_decision :]:
            if decision.position >= end:
                break
            self._in_chunk.append(decision)
        queries = [
            Query(offset + d.position - self._at, self.rules.deciding(d.think_set), float(self.uniforms[d.line, 1]))
            for d in self._in_chunk
        ] + [Query(offset + d.position - self._at, self.rules.deciding(d.think_set)) for d in again]
        return Extend(self.row, [*self._carry, *self.expert.ids[self._at : end].tolist()], queries)

    def _chunk_end(self) -> int:
        """End of the last line within the mean distance of two thoughts so far, tokens; at least one line's end."""
        expected = min(self.settings.chunk_tokens, (FIRST_CHUNK + self._at) // (1 + len(self._thoughts)))
        lines = bisect_right(self._ends, self._at + expected)
        return self._ends[max(lines - 1, bisect_right(self._ends, self._at))]

    def absorb(self, extend: Extend, answer: Answer) -> None:
        """Go on with the answer to what `extend` asked."""
        offset, self._carry = len(self._carry), []
        before = len(self._ids) + offset
        self._ids += extend.ids
        if self._line is not None:
            token = int(answer.drawn[-1])
            self._ids.append(token)
            self._actions.append((before, float(answer.drawn_log_probs[-1]), float(answer.log_masses[-1])))
            self._after_sample(token)
            return
        forced = len(extend.ids) - offset
        self._token_log_probs[self._at : self._at + forced] = answer.log_probs[offset:]
        if self._reread is not None:
            self._log_act[self._reread.line] = _log_act(answer.log_masses[-1])
            self._reread = None
        for i, decision in enumerate(self._in_chunk):
            self._next_decision += 1
            self._log_act[decision.line] = _log_act(answer.log_masses[i])
            place = before + decision.position - self._at
            if not self._fits(decision, place):
                continue
            p_think = float(np.exp(min(0.0, answer.log_masses[i])))
            self._offered.append(decision)
            self._p_think.append(p_think)
            if self.uniforms[decision.line, 0] < p_think:
                self._actions.append((place, float(answer.drawn_log_probs[i]), 0.0))
                given = self._line_log_prob(decision.line) - self._log_act[decision.line]
                self._without_thought[decision.line] = given
                self._think(decision, int(answer.drawn[i]), place)
                return
            self._actions.append((place, float(np.log1p(-p_think)), 0.0))
        self._at += forced

    def _line_log_prob(self, line: int) -> float:
        """Sum over a line's tokens as they were last forced in, nats."""
        return float(self._token_log_probs[self._starts[line] : self._ends[line]].sum())

    def _fits(self, decision: Decision, place: int) -> bool:
        """Whether a thought of any length that begins at `place`, and the rest of the text, fit into the row."""
        forced = len(self.rules.completion(decision.think_set)) + len(self.rules.ending)
        rest = len(self.expert.ids) - self._starts[decision.line]
        return place + self.settings.max_latent_tokens + forced + rest <= self.engine.max_tokens

    def _think(self, decision: Decision, token: int, place: int) -> None:
        """A thought begins with `token` at `place`; its forced prefix is there already."""
        if self.shared:
            self.row, self.shared = self.engine.fork(self.row, place), False
        else:
            self.engine.rollback(self.row, place)
        del self._ids[place:]
        self._at = self._starts[decision.line]
        self._begin = place - len(decision.forced)
        self._line, self._sampled, self._reread = decision.line, 0, decision
        self._carry = [token, *self.rules.forced_after(decision.think_set, token)]
        self._after_sample(token)

    def _after_sample(self, token: int) -> None:
        """Count a sampled token: the thought ends with it, is ended by force, or goes on."""
        assert self._line is not None
        self._sampled += 1
        if token in self.rules.closing:
            self._carry += self.rules.tail
        elif self._sampled < self.settings.max_latent_tokens:
            return
        else:
            self._truncated.append(self._line)
            self._carry += self.rules.ending
        self._thoughts[self._line] = self._ids[self._begin :] + self._carry
        self._line = None

    def result(self) -> Rollout:
        """The finished rollout."""
        actions = np.array(self._actions, dtype=np.float64).reshape(-1, 3)
        infused = splice(replace(self.expert, decisions=tuple(self._offered)), self._thoughts)
        assert self._ids == infused.ids.tolist(), "the row and the spliced text differ"
        return Rollout(
            number=self.place[0],
            member=self.place[1],
            trajectory=infused,
            line_log_probs=np.array([self._line_log_prob(line) for line in range(self.expert.num_lines)]),
            without_thought=self._without_thought,
            log_act=self._log_act,
            p_think=np.array(self._p_think),
            thought=np.array([d.line in self._thoughts for d in self._offered], dtype=bool),
            positions=actions[:, 0].astype(np.int64),
            log_probs=actions[:, 1],
            log_allowed=actions[:, 2],
            truncated=tuple(self._truncated),
            not_offered=len(self.expert.decisions) - len(self._offered),
            temperature=self.settings.temperature,
            weights_version=self.engine.weights_version,
        )


def rollout(
    engine: RolloutEngine,
    trajectories: Sequence[Trajectory],
    group_size: int,
    uniforms: Uniforms,
    settings: RolloutSettings,
    think_tokens: ThinkTokens,
) -> list[Rollout]:
    """Draw `group_size` rollouts of every trajectory (without thoughts so far) from the policy in `engine`.

    Returns them in order of (trajectory, member). `think_tokens` are those the trajectories were made with. Rows that
    end make room at once. Raises UserError for a text longer than the engine's rows.
    """
    if settings.max_latent_tokens < 1 or settings.chunk_tokens < 1 or settings.temperature <= 0:
        raise UserError(
            f"rollouts with {settings}; thoughts and chunks have at least one token and the temperature is above 0; "
            "raise what is too small"
        )
    for trajectory in trajectories:
        if len(trajectory.ids) > engine.max_tokens:
            raise UserError(
                f"a rollout of {trajectory.name or 'a snippet'} with {len(trajectory.ids)} tokens; the engine has room "
                f"for {engine.max_tokens} a row; raise max_tokens or cut the snippets shorter"
            )
    rules = ThoughtRules(engine, think_tokens)
    # Long texts first: a long one that begins last would run alone.
    order = sorted(range(len(trajectories)), key=lambda i: -len(trajectories[i].ids))
    waiting = deque((number, member) for number in order for member in range(group_size))
    parties: list[Party] = []
    finished: dict[tuple[int, int], Rollout] = {}
    while waiting or parties:
        parties += _entering(engine, waiting, trajectories, uniforms, rules, settings, parties)
        ready = [p for p in parties if not p.members[0].done]
        extends = [p.extend() for p in ready]
        ended = [p for p in parties if p.members[0].done]
        parties = []
        for party, answer in zip(ready, engine.step(extends, settings.temperature), strict=True):
            for left in party.absorb(answer):
                (ended if left.members[0].done else parties).append(left)
        for party in ended:
            for walk in party.members:
                finished[walk.place] = walk.result()
            engine.close(party.row)
    return [finished[place] for place in sorted(finished)]


def _entering(
    engine: RolloutEngine,
    waiting: deque[tuple[int, int]],
    trajectories: Sequence[Trajectory],
    uniforms: Uniforms,
    rules: ThoughtRules,
    settings: RolloutSettings,
    parties: Sequence[Party],
) -> list[Party]:
    """Who there is room for: each may need a row of its own."""
    entering: list[Party] = []
    for _ in range(min(len(waiting), engine.max_batch - sum(len(p.members) for p in parties))):
        place = waiting.popleft()
        expert = trajectories[place[0]]
        numbers = uniforms(*place, (expert.num_lines, 1 + settings.max_latent_tokens))
        last = entering[-1] if entering else None
        if last is not None and last.members[0].place[0] == place[0]:
            last.join(_Walk(place, expert, numbers, rules, settings, engine, last.row))
        else:
            entering.append(Party([_Walk(place, expert, numbers, rules, settings, engine)]))
    return entering
