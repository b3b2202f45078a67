"""Windows of an update: as few as can be, and as short; texts with one beginning hold it once per window."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.packing import TrainSequence, pack, padded

LENGTHS = 64
"""Window lengths that updates may have."""


def share_beginning(sequences: Sequence[TrainSequence], start: int) -> list[TrainSequence]:
    """The same texts, whose first `start` tokens are the same and have no weight, in one sequence with branches.

    A branch begins with the last of those tokens, so that it predicts the branch's first own one. Texts that have no
    more than the beginning follow as they are, as do all where there is nothing to share.
    """
    prefix = start - 1
    longer = [s for s in sequences if len(s.ids) > start]
    if prefix < 1 or len(longer) < 2:
        return list(sequences)
    return [_joined(longer, prefix), *(s for s in sequences if len(s.ids) <= start)]


def _joined(sequences: Sequence[TrainSequence], prefix: int) -> TrainSequence:
    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate((arrays[0][:prefix], *(a[prefix:] for a in arrays)))

    if len(sequences) == 1:
        return sequences[0]
    sizes, first = [len(s.ids) - prefix for s in sequences], sequences[0]
    return TrainSequence(
        join([s.ids for s in sequences]),
        {name: join([s.weights[name] for s in sequences]) for name in first.weights},
        {name: join([s.extras[name] for s in sequences]) for name in first.extras},
        branches=tuple((prefix + np.cumsum([0, *sizes[:-1]])).tolist()),
    )


def unshared(sequence: TrainSequence) -> list[TrainSequence]:
    """The texts of a sequence, each with its beginning."""
    if not sequence.branches:
        return [sequence]
    prefix, ends = sequence.branches[0], (*sequence.branches[1:], len(sequence.ids))

    def cut(array: np.ndarray, start: int, end: int) -> np.ndarray:
        return np.concatenate((array[:prefix], array[start:end]))

    return [
        TrainSequence(
            cut(sequence.ids, start, end),
            {name: cut(values, start, end) for name, values in sequence.weights.items()},
            {name: cut(values, start, end) for name, values in sequence.extras.items()},
        )
        for start, end in zip(sequence.branches, ends, strict=True)
    ]


@dataclass
class _Window:
    room: int
    parts: dict[int, list[int]] = field(default_factory=dict)
    """Numbers of texts by that of their sequence."""


class Windows:
    """How to fill windows with `sequences`, of which those with branches may be cut between texts.

    `longest`: most tokens of a window. Windows are a multiple of `unit` long, or `longest`, and have at most `LENGTHS`
    different lengths, so that a GPU's memory is not split into pieces of every size. `multiple` as in `pack`. They come
    in numbers that are multiples of `group`. Raises UserError for a text longer than a window.
    """

    def __init__(self, sequences: Sequence[TrainSequence], longest: int, multiple: int, unit: int, group: int) -> None:
        self._texts = [unshared(s) for s in sequences]
        self._beginnings = [s.branches[0] if s.branches else 0 for s in sequences]
        self._longest, self._multiple = longest, multiple
        self._step = unit * max(1, longest // (LENGTHS * unit))
        lengths = padded(np.array([len(t.ids) for texts in self._texts for t in texts], dtype=np.int64), multiple)
        self._lengths, self._widest = lengths, int(lengths.max(initial=1))
        if self._widest > longest:
            raise UserError(
                f"a sequence has {self._widest} tokens; windows hold {longest}; raise train.seq_length, or lower "
                "rlvr.max_tokens"
            )
        # Padded for context parallelism, a text begins at a multiple of its own.
        self._shares = any(self._beginnings) and multiple == 1
        self.fewest = self._count(longest)
        """Least number of windows of `longest` tokens that hold everything."""
        if self._shares:
            shared, self._shares = self._positions(group), False
            plain, count = self._positions(group), self._count(longest)
            # Long texts leave gaps, of which whole ones, packed in any order, may leave fewer.
            self._shares = shared <= plain
            self.fewest = self.fewest if self._shares else count

    def _positions(self, group: int) -> int:
        """Tokens, padding included, of as few windows as can be."""
        count = -(-self._count(self._longest) // group) * group
        return count * self.length(count)

    def length(self, windows: int) -> int:
        """Shortest length at which `windows` windows hold everything, if they do at the longest."""
        total = int(self._lengths.sum())
        if self._shares:
            total = sum(
                beginning + sum(len(t.ids) - beginning for t in texts)
                for beginning, texts in zip(self._beginnings, self._texts, strict=True)
            )
        least = max(self._widest, -(-total // max(1, windows)))
        tried = range(-(-least // self._step) * self._step, self._longest, self._step)
        # A longer window may by bad luck need one more of them; the one found has been tried.
        at = bisect_left(tried, True, key=lambda length: self._count(length) <= windows)
        return tried[at] if at < len(tried) else self._longest

    def _count(self, length: int) -> int:
        return len(self._placed(length) if self._shares else pack(self._lengths, length, self._multiple))

    def fill(self, windows: int) -> tuple[int, list[list[TrainSequence]]]:
        """(length, sequences of each window), at most `windows` of them; `windows` is at least `fewest`."""
        length = self.length(windows)
        if not self._shares:
            texts = [t for own in self._texts for t in own]
            packing = pack(self._lengths, length, self._multiple)
            return length, [[texts[i] for i in packing.window(w)] for w in range(len(packing))]
        return length, [
            [
                _joined([self._texts[s][t] for t in sorted(part)], self._beginnings[s])
                for s, part in window.parts.items()
            ]
            for window in self._placed(length)
        ]

    def _placed(self, length: int) -> list[_Window]:
        """Best-fit-decreasing, sequence by sequence; in a window that has its beginning already a text takes less."""
        windows: list[_Window] = []
        order = sorted(range(len(self._texts)), key=lambda s: -sum(len(t.ids) for t in self._texts[s]))
        for number in order:
            texts, beginning = self._texts[number], self._beginnings[number]
            for t in sorted(range(len(texts)), key=lambda t: -len(texts[t].ids)):
                self._place(windows, length, number, t, len(texts[t].ids), beginning)
        return windows

    @staticmethod
    def _place(windows: list[_Window], length: int, number: int, text: int, size: int, beginning: int) -> None:
        own = [w for w in windows if number in w.parts and w.room >= size - beginning]
        if own:
            chosen, taken = min(own, key=lambda w: w.room), size - beginning
        else:
            others = [w for w in windows if w.room >= size]
            taken = size
            if others:
                chosen = min(others, key=lambda w: w.room)
            else:
                chosen = _Window(length)
                windows.append(chosen)
        chosen.room -= taken
        chosen.parts.setdefault(number, []).append(text)
