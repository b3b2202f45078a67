"""The durable record of answers to tasks and of what the judge said of them.

Answers of one call of the engine are a batch, closed by a frame `draw`; their verdicts follow in a batch of their own,
closed by a frame `judged` (`rollout/frames.py`). So neither another set of rows nor the timing of a judge can change
what a resumed run learns from: what is recorded is read back, and only what is missing is made again.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.rollout.completion import Completion, Prompt
from ra3_megatron.rollout.frames import Batch, FrameFiles, Place, arrays_of, columns_of, read_frame

FORMAT = 1
SUFFIX = ".answers"


@dataclass(frozen=True, order=True)
class AnswerKey:
    """Which answer of a stage."""

    position: int
    """Place of its task in the endless order of the tasks."""
    member: int
    """Number in the task's group."""


@dataclass(frozen=True)
class DrawCost:
    """One complete call of the engine, and what it cost this replica."""

    weights_version: int
    """Of the weights that sampled: steps they had taken."""
    answers: int
    """Number of answers."""
    forward_passes: int = 0
    """Forward passes of the model."""
    tokens: int = 0
    """Tokens fed into them."""


@dataclass(frozen=True)
class Judged:
    """What the record keeps of a verdict; plain values, so that this package knows no judge."""

    outcome: str
    """How the program ended (`reward.problem.Outcome`)."""
    passed: int
    """Tests passed."""
    total: int
    """Tests there are."""
    message: str = ""
    """What happened at the first failure, for people."""

    @property
    def ok(self) -> bool:
        """Whether every test passed."""
        return self.outcome == "passed"

    @property
    def fraction(self) -> float:
        """Tests passed of all."""
        return self.passed / self.total if self.total else 0.0


class AnswerLedger:
    """Answers of one stage in `folder`; this process appends to the file `shard` and reads all files.

    `settings` names what the answers depend on besides key and weights (policy, sampling, tasks): those of others are
    passed over. One process per shard. Raises UserError for a damaged file.
    """

    def __init__(self, folder: Path | str, shard: str, settings: str) -> None:
        self.settings = settings
        self._files = FrameFiles(folder, shard, SUFFIX, ("draw", "judged"))
        self.path = self._files.path
        self._answers: dict[tuple[AnswerKey, int], Place] = {}
        self._costs: dict[tuple[int, int], DrawCost] = {}
        self._verdicts: dict[tuple[AnswerKey, int], tuple[int, Judged]] = {}
        for batch in self._files.batches():
            self._index(batch)

    def _index(self, batch: Batch) -> None:
        closing = batch.closing
        if closing["format"] != FORMAT:
            raise UserError(
                f"{batch.path} has format {closing['format']}; this version reads {FORMAT}; go on with the version "
                "that wrote it, or delete the file: its answers are then drawn again"
            )
        if closing["settings"] != self.settings:
            return
        for place, header in batch.frames:
            if header["kind"] == "answer":
                self._answers[AnswerKey(**header["key"]), header["values"]["weights_version"]] = place
                continue
            for position, member, version, checksum, *verdict in header["verdicts"]:
                self._verdicts[AnswerKey(position, member), version] = (checksum, Judged(*verdict))
        if closing["kind"] == "draw" and batch.path == self.path:
            self._costs[closing["first"], closing["cost"]["weights_version"]] = DrawCost(**closing["cost"])

    def has(self, key: AnswerKey, version: int) -> bool:
        """Whether the answer is there, drawn with the weights of `version`."""
        return (key, version) in self._answers

    def verdict(self, key: AnswerKey, answer: Completion) -> Judged | None:
        """What was said of this very answer; none where nothing is recorded."""
        checksum, found = self._verdicts.get((key, answer.weights_version), (None, None))
        return found if checksum == _checksum(answer) else None

    def cost(self, first: int, version: int) -> DrawCost:
        """What this shard's draw that begins with position `first` cost when it was made; nothing where unknown."""
        return self._costs.get((first, version), DrawCost(version, 0))

    def read(self, key: AnswerKey, version: int, prompt: Prompt) -> Completion:
        """An answer that is there, to the `prompt` it was drawn for."""
        header, content = read_frame(self._answers[key, version])
        arrays: dict[str, Any] = arrays_of(header["columns"], content)
        return Completion(prompt=prompt, **arrays, **header["values"])

    def add_draw(self, first: int, keys: Sequence[AnswerKey], found: Sequence[Completion], cost: DrawCost) -> None:
        """Record a complete call of the engine, whose tasks begin with position `first`; durable when this returns."""
        places = []
        for key, answer in zip(keys, found, strict=True):
            arrays: dict[str, np.ndarray] = {"ids": answer.ids, "log_probs": answer.log_probs}
            values = {
                "finish": answer.finish,
                "text_bytes": answer.text_bytes,
                "temperature": answer.temperature,
                "weights_version": answer.weights_version,
            }
            header = {"kind": "answer", "key": asdict(key), "values": values, "columns": columns_of(arrays)}
            places.append(self._files.append(header, list(arrays.values())))
        self._close("draw", first=first, cost=asdict(cost))
        version = cost.weights_version
        self._answers.update({(k, version): p for k, p in zip(keys, places, strict=True)})
        self._costs[first, version] = cost

    def add_verdicts(self, verdicts: Sequence[tuple[AnswerKey, Completion, Judged]]) -> None:
        """Record what was said of answers; durable when this returns."""
        rows = [
            [k.position, k.member, answer.weights_version, _checksum(answer), v.outcome, v.passed, v.total, v.message]
            for k, answer, v in verdicts
        ]
        self._files.append({"kind": "verdicts", "verdicts": rows}, [])
        self._close("judged")
        self._verdicts.update({(k, answer.weights_version): (_checksum(answer), v) for k, answer, v in verdicts})

    def _close(self, kind: str, **facts: Any) -> None:
        # The frames first, so that a closing frame on disk never stands for some that are not.
        self._files.sync()
        self._files.append({"kind": kind, "format": FORMAT, "settings": self.settings, **facts}, [])
        self._files.sync()

    def close(self) -> None:
        """Close the file; nothing may be added afterwards."""
        self._files.close()


def _checksum(answer: Completion) -> int:
    """Of the ids: a verdict is about one text, whichever process drew it."""
    return zlib.crc32(np.ascontiguousarray(answer.ids, dtype=np.int32).tobytes())
