"""What a rollout engine does: rows of tokens that are extended by any mix of forced and sampled tokens.

Nothing random happens inside an engine: every draw comes with its own uniform number, and is the inverse of the
cumulative distribution in the order of ids. Results therefore do not depend on how rows are batched, on chunk sizes or
on the number of processes (beyond rounding of the logits). Rows stay open between calls, so that an engine may keep
what it computed; `rollback` shortens one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Query:
    """A question about the distribution of one token: the mass of a set and, with a uniform, a draw from that set."""

    offset: int
    """Which token: `ids[offset]` of the `Extend` it belongs to; `len(ids)` is the token after them."""
    token_set: int
    """Number of the set, from `RolloutEngine.token_set`."""
    uniform: float | None = None
    """A number in [0, 1) that makes the draw; none = no draw."""
    top_p: float = 1.0
    """The draw is from the smallest set of most probable ids of the token set that holds this share of its mass, the
    lower ids first among equals; 1 = from all of it, 0 = the most probable id whatever the uniform. The log-mass is of
    the whole token set all the same."""


@dataclass(frozen=True, slots=True)
class Extend:
    """Append `ids` to an open row and answer `queries`; the row's own tokens and the ids are all forced."""

    row: int
    """The row, from `RolloutEngine.open`."""
    ids: Sequence[int] = ()
    """Forced ids, any number."""
    queries: Sequence[Query] = ()
    """Questions, in any order."""
    append: bool = False
    """Append the draw of the last query, which must ask for the token after `ids`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one `Extend`; probabilities are of the whole vocabulary, nothing masked."""

    log_probs: np.ndarray
    """float64 [ids]: log-probability of every forced id at temperature 1, nats."""
    log_masses: np.ndarray
    """float64 [queries]: log of the set's probability after temperature, nats."""
    drawn: np.ndarray
    """int64 [queries]: the id drawn from the set; -1 without a uniform or when the set has probability 0."""
    drawn_log_probs: np.ndarray
    """float64 [queries]: log-probability of that id after temperature, nats; subtract the log-mass for its
    probability within the set. NaN where nothing was drawn."""


@dataclass(slots=True)
class EngineCounters:
    """Work done so far by this process's model replica."""

    forward_passes: int = 0
    """Forward passes of the whole model."""
    tokens: int = 0
    """Tokens fed into them, padding left out."""
    rolled_back: int = 0
    """Tokens fed whose result was thrown away by a rollback."""
    decode_passes: int = 0
    """Passes in which every row went on by a token and asked the same question."""
    graph_passes: int = 0
    """Of these: replays of a CUDA graph."""
    ordinary: dict[str, int] = field(default_factory=dict)
    """Steps that were no decode pass, by reason."""


class RolloutEngine(Protocol):
    """Rows of tokens under a language model. All processes of a model replica make the same calls and get the same.

    `max_batch`: rows that may be open at once; `max_tokens`: tokens a row may have; `weights_version`: of which weights
    the answers are; `description`: one line for the log.
    """

    max_batch: int
    max_tokens: int
    weights_version: int
    counters: EngineCounters
    description: str

    def open(self, ids: Sequence[int]) -> int:
        """Start a row with at least one id; returns its handle. Raises UserError when no room is left."""

    def fork(self, row: int, length: int) -> int:
        """Start a row with the first `length` >= 1 tokens of an open one and what is computed of them; returns its
        handle. Raises UserError when no room is left."""

    def close(self, row: int) -> None:
        """End a row; its room is free for another."""

    def length(self, row: int) -> int:
        """Tokens of a row."""

    def rollback(self, row: int, length: int) -> None:
        """Shorten a row to its first `length` >= 1 tokens."""

    def token_set(self, ids: Sequence[int] | np.ndarray) -> int:
        """Number of a set of ids for `Query`; the same ids give the same number."""

    def step(self, extends: Sequence[Extend], temperature: float = 1.0) -> list[Answer]:
        """Extend rows, each at most once, and answer in the same order.

        `temperature` > 0 divides the logits of the queries; forced ids are always scored at temperature 1.
        """
