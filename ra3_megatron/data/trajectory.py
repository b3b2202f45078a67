"""Trajectories: token ids of one snippet with its segments (prompt, thoughts, lines) and its decision points.

Ids are made here, once; rollout, scoring and fine-tuning use exactly these (ra3: "Decision token").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from ra3_megatron.data.blocks import cut_depths, split_ranges, surroundings
from ra3_megatron.data.latent import LatentFormat, ThinkTokens
from ra3_megatron.data.lines import LogicalLine
from ra3_megatron.data.tokenizers import Tokenizer


class Kind(IntEnum):
    """What a segment is."""

    PROMPT = 0
    THOUGHT = 1
    CODE = 2


PADDING_KIND = 255
"""In per-token arrays of kinds: a position that predicts nothing."""


class RoundTripError(ValueError):
    """The tokenizer does not give a snippet's text back. Callers drop and count the snippet."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`ids[start:end]` of a trajectory; `line` is the line it is or precedes, -1 for the prompt."""

    kind: Kind
    line: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to think before line `line`.

    `ids[position]` is the token that decides; the `forced` ids before it are common to the line and to every thought.
    `think_set` numbers the tokens that decide for a thought (`ThinkTokens[think_set]`).
    """

    line: int
    position: int
    forced: tuple[int, ...]
    think_set: int


@dataclass(frozen=True)
class Trajectory:
    """One snippet, ready for rollout, scoring and training.

    `ids` int32 `[tokens]` is the concatenation of `segments`. `cuts` int16 `[lines]`: depth of the line if a piece may
    start with it, -1 otherwise. `has_start`: ids[0] is the start token (kind prompt, no text). `ends_document`: the
    document ends here, so an end token may follow. `prefix`, `suffix`: text that makes a piece a program, for checks.
    """

    ids: np.ndarray = field(repr=False)
    segments: tuple[Segment, ...] = field(repr=False)
    decisions: tuple[Decision, ...] = field(repr=False)
    cuts: np.ndarray = field(repr=False)
    name: str = ""
    has_start: bool = False
    ends_document: bool = True
    prefix: str = ""
    suffix: str = ""

    @property
    def num_lines(self) -> int:
        """Number of action lines."""
        return len(self.cuts)

    def kinds(self) -> np.ndarray:
        """Kind of every token, uint8 `[tokens]`."""
        lengths = [s.end - s.start for s in self.segments]
        return np.repeat(np.array([s.kind for s in self.segments], dtype=np.uint8), lengths)

    def lines(self) -> np.ndarray:
        """Line of every token, -1 in the prompt, int32 `[tokens]`."""
        lengths = [s.end - s.start for s in self.segments]
        return np.repeat(np.array([s.line for s in self.segments], dtype=np.int32), lengths)

    def segment(self, line: int, kind: Kind = Kind.CODE) -> Segment | None:
        """The segment of that kind and line, None when there is none."""
        return next((s for s in self.segments if s.line == line and s.kind == kind), None)

    def thoughts(self) -> dict[int, np.ndarray]:
        """Ids of the thought before each line that has one."""
        return {s.line: self.ids[s.start : s.end] for s in self.segments if s.kind == Kind.THOUGHT}

    def program(self, tokenizer: Tokenizer) -> str:
        """The text with what makes it a program by itself."""
        return self.prefix + tokenizer.decode(self.ids) + self.suffix


def _assemble(parts: Sequence[tuple[Kind, int, Sequence[int] | np.ndarray]]) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """Concatenate (kind, line, ids) parts."""
    segments, position = [], 0
    for kind, line, ids in parts:
        segments.append(Segment(kind, line, position, position + len(ids)))
        position += len(ids)
    ids = np.concatenate([np.asarray(ids, dtype=np.int32) for _, _, ids in parts]) if parts else np.zeros(0, np.int32)
    return ids, tuple(segments)


class TrajectoryBuilder:
    """Snippets → trajectories, for one tokenizer, one way to write thoughts and one start token."""

    def __init__(self, tokenizer: Tokenizer, think_tokens: ThinkTokens, start_id: int | None):
        self.tokenizer = tokenizer
        self.think_tokens = think_tokens
        self.start_id = start_id

    def build(
        self, code: str, prompt: str = "", name: str = "", lines: Sequence[LogicalLine] | None = None
    ) -> Trajectory:
        """The trajectory of a whole document; `code` and `prompt` normalised text, `lines` those of `code`.

        Raises LineError when the lines of `code` cannot be found, RoundTripError when the tokenizer changes the text.
        """
        lines = self.think_tokens.format.lines(code) if lines is None else lines
        texts = [code[line.start : line.end] for line in lines]
        unique = dict.fromkeys([*texts, prompt])  # a tenth to a third of all lines occur before
        encoded = dict(zip(unique, self.tokenizer.encode_batch(list(unique)), strict=True))
        *line_ids, prompt_ids = [encoded[text] for text in [*texts, prompt]]
        start = [] if self.start_id is None else [self.start_id]
        parts: list[tuple[Kind, int, Sequence[int]]] = []
        if start or prompt_ids:
            parts.append((Kind.PROMPT, -1, start + prompt_ids))
        decisions, position = [], len(start) + len(prompt_ids)
        for number, (line, text, own_ids) in enumerate(zip(lines, texts, line_ids, strict=True)):
            decision = self.think_tokens.decide(line.indent, text, own_ids)
            if decision is not None and position + decision[0] > 0:
                forced, think_set = decision
                decisions.append(Decision(number, position + forced, tuple(own_ids[:forced]), think_set))
            parts.append((Kind.CODE, number, own_ids))
            position += len(own_ids)
        ids, segments = _assemble(parts)
        if self.tokenizer.decode_bytes(ids.tolist()) != (prompt + code).encode("utf-8", errors="surrogatepass"):
            raise RoundTripError(f"{name or 'snippet'}: decoding the ids gives another text")
        return Trajectory(ids, segments, tuple(decisions), cut_depths(lines), name, bool(start))

    def pieces(
        self, trajectory: Trajectory, code: str, limit: int, lines: Sequence[LogicalLine] | None = None
    ) -> tuple[list[Trajectory], int]:
        """Cut a document's trajectory into pieces of at most `limit` tokens, each checkable as a program.

        Returns (pieces, number of lines lost because they fit in no piece). `code` is the text it was built from.
        """
        if len(trajectory.ids) <= limit:
            return [trajectory], 0
        pieces, lost = split_trajectory(trajectory, limit, self.start_id)
        lines = self.think_tokens.format.lines(code) if lines is None else lines
        wrapped = []
        for piece, (start, end) in pieces:
            prefix, suffix = surroundings(code, lines, start, end)
            wrapped.append(replace(piece, prefix=prefix, suffix=suffix))
        return wrapped, lost


def split_trajectory(
    trajectory: Trajectory, limit: int, start_id: int | None
) -> tuple[list[tuple[Trajectory, tuple[int, int]]], int]:
    """Cut a trajectory (with or without thoughts) at lines into pieces of at most `limit` tokens.

    A thought stays with its line. Every piece begins with `start_id` (unless None); the prompt stays with the first.
    Returns ([(piece, [start, end) of its lines)], number of lines lost because they fit in no piece).
    """
    prompt = trajectory.segments[0] if trajectory.segments and trajectory.segments[0].kind == Kind.PROMPT else None
    lengths = np.bincount(
        [s.line for s in trajectory.segments if s.line >= 0],
        weights=[s.end - s.start for s in trajectory.segments if s.line >= 0],
        minlength=trajectory.num_lines,
    ).astype(np.int64)
    head = 0 if start_id is None else 1
    prompt_text = prompt.end - prompt.start - int(trajectory.has_start) if prompt else 0
    if trajectory.num_lines:
        lengths[0] += prompt_text
    ranges, lost = split_ranges(lengths, trajectory.cuts, limit - head)
    pieces = []
    for start, end in ranges:
        parts: list[tuple[Kind, int, Sequence[int] | np.ndarray]] = []
        begin = [] if start_id is None else [start_id]
        if start == 0 and prompt is not None and prompt_text:
            begin += trajectory.ids[prompt.end - prompt_text : prompt.end].tolist()
        if begin:
            parts.append((Kind.PROMPT, -1, begin))
        own = [s for s in trajectory.segments if start <= s.line < end]
        parts += [(s.kind, s.line - start, trajectory.ids[s.start : s.end]) for s in own]
        ids, segments = _assemble(parts)
        shift = len(begin) - own[0].start
        decisions = tuple(
            replace(d, line=d.line - start, position=d.position + shift)
            for d in trajectory.decisions
            if start <= d.line < end and d.position + shift > 0
        )
        ends = trajectory.ends_document and end == trajectory.num_lines
        whole = start == 0 and end == trajectory.num_lines
        piece = Trajectory(
            ids,
            segments,
            decisions,
            trajectory.cuts[start:end],
            trajectory.name,
            start_id is not None,
            ends,
            trajectory.prefix if whole else "",
            trajectory.suffix if whole else "",
        )
        pieces.append((piece, (start, end)))
    return pieces, lost


def splice(trajectory: Trajectory, thoughts: Mapping[int, Sequence[int] | np.ndarray]) -> Trajectory:
    """Put thoughts into a trajectory without any.

    `thoughts`: line → ids of the whole thought, from the forced tokens to the end of its line. Each decision then
    points to the token that decided: in the thought where there is one, in the line otherwise.
    """
    assert all(s.kind != Kind.THOUGHT for s in trajectory.segments), "thoughts were spliced in before"
    parts: list[tuple[Kind, int, Sequence[int] | np.ndarray]] = []
    grown = np.zeros(trajectory.num_lines + 1, dtype=np.int64)
    for segment in trajectory.segments:
        if segment.kind == Kind.CODE and segment.line in thoughts:
            parts.append((Kind.THOUGHT, segment.line, thoughts[segment.line]))
            grown[segment.line + 1] = len(thoughts[segment.line])
        parts.append((segment.kind, segment.line, trajectory.ids[segment.start : segment.end]))
    ids, segments = _assemble(parts)
    before = np.cumsum(grown)
    decisions = tuple(replace(d, position=d.position + int(before[d.line])) for d in trajectory.decisions)
    return replace(trajectory, ids=ids, segments=segments, decisions=decisions)


def keeps_program(expert: Trajectory, infused: Trajectory, tokenizer: Tokenizer, latent: LatentFormat) -> bool:
    """Whether the infused snippet still is the expert's program; callers drop and count those that are not."""
    return latent.same_meaning(expert.program(tokenizer), infused.program(tokenizer))
