"""How a latent thought is written into the text, and which tokens decide for one.

`LatentFormat` is the small interface; `CommentFormat` writes a thought as a one-line comment (RA3's form for Python),
`TagFormat` between tags, for text that is no Python. `ThinkTokens` turns a format and a tokenizer into sets of ids.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.lines import LogicalLine, logical_lines, plain_lines, same_program
from ra3_megatron.data.tokenizers import Tokenizer


class LatentFormat(Protocol):
    """A way to write thoughts between the lines of an expert's text.

    A thought is an opening, a content that ends with its line, and a tail that follows by force. `python`: texts are
    Python, so that syntax and comments can be checked.
    """

    name: str
    python: bool
    tail: str

    def lines(self, text: str) -> list[LogicalLine]:
        """Lines of a normalised text: the actions. Raises LineError when they cannot be found."""

    def mistakable(self, text: str) -> bool:
        """Whether an expert's text holds what could not be told from thoughts put in later."""

    def opening(self, indent: str) -> str:
        """Text with which a thought before a line of that indentation begins, and with which no line begins."""

    def render(self, thought: str, indent: str) -> str:
        """The whole thought, end of line included, as it stands in the text."""

    def content(self, text: str) -> str:
        """The thought out of its written form."""

    def token_fits(self, rest: bytes) -> bool:
        """Whether a token may bring `rest` after the opening."""

    def token_closes(self, content: bytes) -> bool:
        """Whether a token inside a thought ends it, exactly at the token's end."""

    def same_meaning(self, expert: str, infused: str) -> bool:
        """Whether the text with thoughts still says what the expert's text says."""


class CommentFormat:
    """A thought is one comment line with the indentation of the line after it; the text stays the same program."""

    name = "comment"
    python = True
    tail = ""
    _inside = re.compile(rb"[^\r\n\0]*\n*")
    _closing = re.compile(rb"[^\r\n\0]*\n+")

    def lines(self, text: str) -> list[LogicalLine]:
        """See LatentFormat: logical lines, never starting inside brackets or strings."""
        return logical_lines(text)

    def mistakable(self, text: str) -> bool:
        """See LatentFormat: never, since `same_meaning` looks at the program alone."""
        return False

    def opening(self, indent: str) -> str:
        """See LatentFormat."""
        return indent + "#"

    def render(self, thought: str, indent: str) -> str:
        """See LatentFormat. Line breaks in `thought` become spaces."""
        return f"{indent}# {' '.join(thought.split())}\n"

    def content(self, text: str) -> str:
        """See LatentFormat."""
        return text.strip().removeprefix("#").strip()

    def token_fits(self, rest: bytes) -> bool:
        """See LatentFormat: after a line end only line ends; no carriage return, which ends lines in Python."""
        return self._inside.fullmatch(rest) is not None

    def token_closes(self, content: bytes) -> bool:
        """See LatentFormat."""
        return self._closing.fullmatch(content) is not None

    def same_meaning(self, expert: str, infused: str) -> bool:
        """See LatentFormat: both parse to the same syntax tree."""
        return same_program(expert, infused)


class TagFormat:
    """A thought is a line that begins with `<think>`, and the line `</think>` after it; for any text, line by line.

    The end of the first line ends what is sampled, and the closing tag follows by force, with probability 1: a tag of
    several tokens needs no rules about which of its parts may follow which, and q stays a proper distribution over
    thoughts. No sampled token may hold the closing tag, so a model that writes it as one token learns the line's end
    instead.
    """

    name = "tag"
    python = False
    tail = "</think>\n"
    _opening, _closing_tag = "<think>", b"</think>"
    _inside = re.compile(rb"[^\r\n\0]*\n*")
    _closing = re.compile(rb"[^\r\n\0]*\n+")
    _block = re.compile(r"^<think>[^\n]*\n+</think>\n", re.MULTILINE)
    _begins = re.compile(r"^<think>", re.MULTILINE)

    def lines(self, text: str) -> list[LogicalLine]:
        """See LatentFormat: lines that are not blank."""
        return plain_lines(text)

    def mistakable(self, text: str) -> bool:
        """See LatentFormat: a line that begins with the opening tag."""
        return self._begins.search(text) is not None

    def opening(self, indent: str) -> str:
        """See LatentFormat; tags are not indented."""
        return self._opening

    def render(self, thought: str, indent: str) -> str:
        """See LatentFormat. Line breaks in `thought` become spaces."""
        return f"{self._opening}{' '.join(thought.split())}\n{self.tail}"

    def content(self, text: str) -> str:
        """See LatentFormat."""
        return text.strip().removeprefix(self._opening).removesuffix(self.tail.strip()).strip()

    def token_fits(self, rest: bytes) -> bool:
        """See LatentFormat: after a line end only line ends, and no closing tag."""
        return self._inside.fullmatch(rest) is not None and self._closing_tag not in rest

    def token_closes(self, content: bytes) -> bool:
        """See LatentFormat."""
        return self._closing.fullmatch(content) is not None and self._closing_tag not in content

    def same_meaning(self, expert: str, infused: str) -> bool:
        """See LatentFormat: without the thoughts it is the expert's text."""
        return self._block.sub("", infused) == expert


_FORMATS: dict[str, type[CommentFormat] | type[TagFormat]] = {f.name: f for f in (CommentFormat, TagFormat)}


def latent_format(name: str) -> LatentFormat:
    """The format of that name (`latent.format`). Raises UserError for an unknown name."""
    if name not in _FORMATS:
        raise UserError(f"latent.format = {name!r}; known formats: {', '.join(_FORMATS)}; set one of them")
    return _FORMATS[name]()


@dataclass(frozen=True)
class ThinkSet:
    """Tokens that decide for a thought once the forced prefix is there.

    `ids` sorted int64 `[n]`; `remainder` the bytes of the opening that are still to come; `opener` is the one id (if
    any) that is only a part of the remainder: it is how the tokenizer itself begins the opening, and `completion` are
    the ids that must follow it before the thought is free.
    """

    remainder: bytes
    ids: np.ndarray = field(repr=False)
    opener: int | None = None
    completion: tuple[int, ...] = ()

    def forced_after(self, token: int) -> tuple[int, ...]:
        """Ids that follow `token` by force before the thought's free text."""
        return self.completion if token == self.opener else ()


class ThinkTokens:
    """Think sets of one tokenizer and format, made when first asked for and kept by (remainder, completion).

    A set's number is the order of its making; `key` and `restore` carry sets to another process or to disk.
    """

    def __init__(self, tokenizer: Tokenizer, latent: LatentFormat | None = None):
        self.tokenizer = tokenizer
        self.format: LatentFormat = latent or CommentFormat()
        self._sets: list[ThinkSet] = []
        self._numbers: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self._openings: dict[str, tuple[int, ...]] = {}

    def __getitem__(self, number: int) -> ThinkSet:
        return self._sets[number]

    def __len__(self) -> int:
        return len(self._sets)

    def opening_ids(self, indent: str) -> tuple[int, ...]:
        """The tokenised opening at that indentation. Raises UserError when the tokenizer cannot write it."""
        found = self._openings.get(indent)
        if found is None:
            found = self._openings[indent] = self._faithful(self.format.opening(indent))
        return found

    @cached_property
    def tail_ids(self) -> tuple[int, ...]:
        """Ids that follow by force after the token that ended a thought's content."""
        return self._faithful(self.format.tail)

    @cached_property
    def ending_ids(self) -> tuple[int, ...]:
        """Ids that end a thought by force where its content became too long."""
        return self._faithful("\n") + self.tail_ids

    def _faithful(self, text: str) -> tuple[int, ...]:
        """Ids of a part of the format."""
        ids = tuple(self.tokenizer.encode(text))
        found = self.tokenizer.decode_bytes(ids)
        if found != text.encode():
            raise UserError(
                f"latent.format = {self.format.name} writes {text!r}, which the tokenizer gives back as {found!r}; "
                "use a tokenizer with bytes as a fallback, or another format"
            )
        return ids

    def decide(self, indent: str, text: str, line_ids: Sequence[int]) -> tuple[int, int] | None:
        """(number of forced tokens, number of the think set) of the line `text`, tokenised as `line_ids`.

        Forced is the longest common prefix of the tokenised line and the tokenised opening. None when the line itself
        begins like a thought (a human comment kept as an action), since then the two cannot be told apart.
        """
        if text.lstrip("\n").startswith(self.format.opening(indent)):
            return None
        opening = self.opening_ids(indent)
        forced = 0
        while forced < len(opening) and forced < len(line_ids) and opening[forced] == line_ids[forced]:
            forced += 1
        assert forced < min(len(opening), len(line_ids)), "a line began with an opening"
        return forced, self._number(opening[forced:])

    def _number(self, rest: tuple[int, ...]) -> int:
        """Number of the set for the part `rest` of a tokenised opening."""
        remainder = self.tokenizer.decode_bytes(rest)
        completion = rest if len(rest) > 1 else ()
        key = (remainder, completion)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._sets)
            self._sets.append(self._make(remainder, completion))
        return number

    @cached_property
    def _by_bytes(self) -> tuple[list[bytes], list[int]]:
        order = sorted((content, i) for i, content in enumerate(self.tokenizer.token_bytes) if content)
        return [content for content, _ in order], [i for _, i in order]

    def _make(self, remainder: bytes, completion: tuple[int, ...]) -> ThinkSet:
        contents, ids = self._by_bytes
        found = []
        position = bisect_left(contents, remainder)
        while position < len(contents) and contents[position].startswith(remainder):
            if self.format.token_fits(contents[position][len(remainder) :]):
                found.append(ids[position])
            position += 1
        opener = completion[0] if completion else None
        if opener is not None:
            found.append(opener)
        return ThinkSet(remainder, np.array(sorted(set(found)), dtype=np.int64), opener, completion[1:])

    @cached_property
    def closing_ids(self) -> np.ndarray:
        """Ids that end a thought, sorted int64 `[n]`."""
        table = self.tokenizer.token_bytes
        return np.array([i for i, b in enumerate(table) if b and self.format.token_closes(b)], dtype=np.int64)

    @cached_property
    def forbidden_ids(self) -> np.ndarray:
        """Ids not to be sampled inside a thought: special tokens and those that run past its end; int64 `[n]`."""
        table = self.tokenizer.token_bytes
        return np.array([i for i, b in enumerate(table) if not b or not self.format.token_fits(b)], dtype=np.int64)

    def key(self, number: int) -> tuple[str, tuple[int, ...]]:
        """What `restore` needs to make the set elsewhere: (remainder in hexadecimal, its ids when more than one)."""
        found = self._sets[number]
        rest = () if found.opener is None else (found.opener, *found.completion)
        return found.remainder.hex(), rest

    def restore(self, keys: Sequence[tuple[str, Sequence[int]]]) -> list[int]:
        """Add the sets of `keys` where missing; their numbers here, in the order of `keys`."""
        numbers = []
        for remainder, completion in keys:
            key = (bytes.fromhex(remainder), tuple(completion))
            if key not in self._numbers:
                self._numbers[key] = len(self._sets)
                self._sets.append(self._make(*key))
            numbers.append(self._numbers[key])
        return numbers
