"""Completions of prompts: plain sampling of a language model, for RLVR and for evaluation.

As rows end the next prompts enter, and are read in the same pass in which the others go on by a token. What is drawn
depends on the prompt, its number and member, the seed and the weights, not on what else is in the batch (beyond
rounding of the logits).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from ra3_megatron.config.data import _at_least
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.rollout.engine import Answer, Extend, Query, RolloutEngine


@dataclass(frozen=True)
class CompletionSettings:
    """How completions are sampled and where they end."""

    max_tokens: int
    """Tokens of a completion at most, the ending one included."""
    temperature: float = 1.0
    """Divides the logits; 0 = greedy: the most probable token, the lowest id among equals."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of most probable ones that holds this much probability; 1 = all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion as soon as its bytes hold one of them; the token that completed it is kept."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a completion (end of text); kept as its last token."""

    def __post_init__(self) -> None:
        _at_least("max_tokens", self.max_tokens, 1)
        _at_least("temperature", self.temperature, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}; it is a share of probability; set a value above 0, at most 1")
        if "" in self.stop:
            raise UserError("an empty text in stop; it would end every completion at once; leave it out")


@dataclass(frozen=True)
class Prompt:
    """A text to go on with."""

    ids: np.ndarray
    """int32 [prompt], at least one id."""
    number: int
    """Which prompt of the data set: with `member` the key of its random numbers."""
    member: int = 0
    """Which of the completions of the same prompt."""


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt. Token ids are never decoded and encoded again."""

    prompt: Prompt
    """What it goes on from."""
    ids: np.ndarray
    """int32 [completion], the ending token included."""
    log_probs: np.ndarray
    """float64 [completion]: log-probability of each id after temperature (of the whole vocabulary, before `top_p`);
    of a greedy one at temperature 1. Nats."""
    finish: Literal["stop_id", "stop", "length"]
    """Why it ended: an id of `stop_ids`, a text of `stop`, or for want of room."""
    text_bytes: int
    """Bytes of the ids' text (`Tokenizer.decode_bytes`) before what ended it: before the stop text, which is left out
    with what follows, or before the id of `stop_ids`; all of them where it ended for want of room."""
    temperature: float
    """It was sampled at."""
    weights_version: int
    """Of the weights that sampled."""


def complete(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    settings: CompletionSettings,
    tokenizer: Tokenizer,
    seed: int,
    on_done: Callable[[Completion], None] | None = None,
) -> list[Completion]:
    """One completion of every prompt, in their order.

    Any id of the tokenizer may follow, special ones too (as in transformers' `generate`); ids past its own, which are
    padding of the embedding, never do. A row has `engine.max_tokens` tokens: a completion ends with "length" where that
    is reached before `max_tokens`, and a prompt that leaves no room for one token is refused with a UserError, before
    anything is computed. The random numbers are a function of (`seed`, `Prompt.number`, `Prompt.member`) and the
    position. `on_done` is called for each completion as it ends, on every process of the model replica; when it raises,
    the engine's rows are closed.
    """
    _check(engine, prompts, settings, tokenizer)
    ask = partial(Query, 0, engine.token_set(_drawable(tokenizer)), top_p=settings.top_p if settings.temperature else 0)
    desk = _Desk(engine, prompts, settings, tokenizer, seed)
    finished: list[Completion | None] = [None] * len(prompts)
    try:
        while desk.writers or desk.waiting:
            desk.admit()
            extends = [Extend(w.row, (), (ask(w.uniform),), append=True) for w in desk.writers]
            answers = engine.step(extends, settings.temperature or 1.0)
            for number, completion in desk.absorb(answers):
                finished[number] = completion
                if on_done is not None:
                    on_done(completion)
    finally:
        desk.close()
    return [c for c in finished if c is not None]


class _Desk:
    """Which completions are on their way, and who comes next.

    Completions of the same text share what is computed of it: the first one enters alone, the others go on from its
    row one step later, for which room is kept. They do so from any row of that text that is still open.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        settings: CompletionSettings,
        tokenizer: Tokenizer,
        seed: int,
    ) -> None:
        self.waiting = deque(enumerate(prompts))
        self.writers: list[Writer] = []
        self._engine, self._settings, self._tokenizer, self._seed = engine, settings, tokenizer, seed

    def admit(self) -> None:
        """Give the room there is to those that wait, in their order."""
        read = {w.text: w.row for w in self.writers}
        entering: set[bytes] = set()
        later = []
        for _ in range(min(len(self.waiting), self._engine.max_batch - len(self.writers))):
            number, prompt = self.waiting.popleft()
            text = np.asarray(prompt.ids, dtype=np.int64).tobytes()
            if text in entering:
                later.append((number, prompt))
                continue
            if text in read:
                row = self._engine.fork(read[text], len(prompt.ids))
            else:
                row = self._engine.open(prompt.ids.tolist())
                if len(prompt.ids) > 1:
                    entering.add(text)
            self.writers.append(self._writer(number, row, text, prompt))
        self.waiting.extendleft(reversed(later))

    def absorb(self, answers: Sequence[Answer]) -> list[tuple[int, Completion]]:
        """Go on with the answers to all writers; (place in the call, completion) of those that ended and left."""
        ended, going_on = [], []
        for writer, answer in zip(self.writers, answers, strict=True):
            completion = writer.absorb(answer)
            if completion is None:
                going_on.append(writer)
            else:
                self._engine.close(writer.row)
                ended.append((writer.number, completion))
        self.writers = going_on
        return ended

    def close(self) -> None:
        """Close the rows that are still open."""
        for writer in self.writers:
            self._engine.close(writer.row)
        self.writers = []

    def _writer(self, number: int, row: int, text: bytes, prompt: Prompt) -> "Writer":
        room = min(self._settings.max_tokens, self._engine.max_tokens - len(prompt.ids))
        uniforms = np.random.default_rng([self._seed, prompt.number, prompt.member]).random(room)
        version = self._engine.weights_version
        return Writer(number, row, prompt, self._settings, uniforms, self._tokenizer.token_bytes, version, text)


def _check(
    engine: RolloutEngine, prompts: Sequence[Prompt], settings: CompletionSettings, tokenizer: Tokenizer
) -> None:
    for id_ in settings.stop_ids:
        if not 0 <= id_ < tokenizer.vocab_size:
            raise UserError(
                f"stop_ids has {id_}; the tokenizer has {tokenizer.vocab_size} ids; use ids of the model's tokenizer"
            )
    for prompt in prompts:
        if not 1 <= len(prompt.ids) < engine.max_tokens:
            raise UserError(
                f"prompt {prompt.number} has {len(prompt.ids)} tokens; a row has room for {engine.max_tokens}, and a "
                "completion needs one token before it and one of its own; leave the prompt out, or raise the room"
            )


def _drawable(tokenizer: Tokenizer) -> np.ndarray:
    """Ids that stand for something, int64: numbers the tokenizer skips have rows in the embedding all the same."""
    special = tokenizer.special_ids
    return np.array([i for i, text in enumerate(tokenizer.token_bytes) if text or i in special], dtype=np.int64)


class Writer:
    """One completion on its way in a `row`: takes drawn tokens and says when it ends.

    `number` is its place in the call, `uniforms` its random numbers, as many as it may have tokens; `token_bytes` are
    the tokenizer's, `text` names the prompt.
    """

    def __init__(
        self,
        number: int,
        row: int,
        prompt: Prompt,
        settings: CompletionSettings,
        uniforms: np.ndarray,
        token_bytes: Sequence[bytes],
        version: int,
        text: bytes = b"",
    ) -> None:
        self.number, self.row, self.text = number, row, text
        self._prompt, self._settings, self._version = prompt, settings, version
        self._uniforms: list[float] = uniforms.tolist()
        self._token_bytes = token_bytes
        self._stop_ids = frozenset(settings.stop_ids)
        self._stops = tuple(text.encode() for text in settings.stop)
        self._longest = max(map(len, self._stops), default=1)
        self._ids: list[int] = []
        self._log_probs: list[float] = []
        self._bytes = 0
        self._tail = b""  # the end of the text, in which a stop text may have begun

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        return self._uniforms[len(self._ids)]

    def absorb(self, answer: Answer) -> Completion | None:
        """Go on by the drawn token; the completion when it ends with it."""
        token = int(answer.drawn[0])
        self._ids.append(token)
        self._log_probs.append(float(answer.drawn_log_probs[0]))
        if token in self._stop_ids:
            return self._ended("stop_id", self._bytes)
        before = self._bytes - len(self._tail)
        window = self._tail + self._token_bytes[token]
        self._bytes = before + len(window)
        # Earlier tokens completed no stop text: what is found ends in this one.
        if places := [at for stop in self._stops if (at := window.find(stop)) >= 0]:
            return self._ended("stop", before + min(places))
        self._tail = window[max(0, len(window) - self._longest + 1) :]
        return self._ended("length", self._bytes) if len(self._ids) == len(self._uniforms) else None

    def _ended(self, finish: Literal["stop_id", "stop", "length"], text_bytes: int) -> Completion:
        return Completion(
            prompt=self._prompt,
            ids=np.array(self._ids, dtype=np.int32),
            log_probs=np.array(self._log_probs),
            finish=finish,
            text_bytes=text_bytes,
            temperature=self._settings.temperature,
            weights_version=self._version,
        )
