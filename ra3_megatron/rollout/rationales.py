"""Rollouts as text for people: one JSON object per rollout, what the rationale viewer reads. Nothing trains on it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.data.latent import LatentFormat
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.data.trajectory import Kind
from ra3_megatron.rollout.interleaved import Rollout


def rationale_record(
    rollout: Rollout,
    line_log_probs: np.ndarray,
    advantages: np.ndarray | None,
    tokenizer: Tokenizer,
    latent: LatentFormat,
    snippet: int | None = None,
    reward: float | None = None,
) -> dict[str, Any]:
    """One rollout, line by line, as plain JSON.

    `line_log_probs` [lines] summed over the line's tokens, nats, of whichever model scores; `advantages` [lines] or
    none; `snippet` its id in the corpus (default: the rollout's number); `reward` mean over its lines. The gain is that
    of the model that sampled, nats per token, and stands at lines with a thought alone.
    """
    trajectory = rollout.trajectory
    p_think = {d.line: float(p) for d, p in zip(trajectory.decisions, rollout.p_think, strict=True)}
    thoughts = trajectory.thoughts()
    lines = []
    for segment in trajectory.segments:
        if segment.kind != Kind.CODE:
            continue
        line, tokens = segment.line, segment.end - segment.start
        thought = thoughts.get(line)
        gain = None
        if thought is not None:
            gain = _number(rollout.gains[line] / tokens)
        lines.append(
            {
                "text": tokenizer.decode(trajectory.ids[segment.start : segment.end].tolist()),
                "tokens": tokens,
                "log_prob": _number(line_log_probs[line]),
                "thought": None if thought is None else latent.content(tokenizer.decode(thought.tolist())),
                "thought_tokens": 0 if thought is None else len(thought),
                "p_think": p_think.get(line),
                "gain": gain,
                "advantage": None if advantages is None else _number(advantages[line]),
            }
        )
    return {
        "snippet": rollout.number if snippet is None else snippet,
        "name": trajectory.name,
        "member": rollout.member,
        "reward": None if reward is None else _number(reward),
        "lines": lines,
    }


def _number(value: Any) -> float | None:
    """A Python float; None for what JSON cannot hold."""
    found = float(value)
    return found if math.isfinite(found) else None


def write_rationales(path: Path | str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, the whole file at once: a reader sees the old file or the new one."""
    content = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    atomic_write_text(path, content)
