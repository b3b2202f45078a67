"""Completions of prompts: plain sampling of a language model, for RLVR and for evaluation."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ra3_megatron.config.data import _at_least
from ra3_megatron.config.errors import UserError


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
    """Bytes of the ids' text up to the stop text, which is left out with what follows; without one, all of them."""
    temperature: float
    """It was sampled at."""
    weights_version: int
    """Of the weights that sampled."""
