"""Lines, the actions of RA3: logical lines of Python source, where a comment may be put, and lines of other text."""

import ast
import io
import tokenize
import warnings
from dataclasses import dataclass
from itertools import pairwise

CONTINUES_STATEMENT = frozenset({"else", "elif", "except", "finally", "case"})
"""First words of lines that belong to the compound statement before them; a piece of a program cannot start there."""

PARSE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What `ast.parse` raises for text that is no program of this Python version (MemoryError: nested too deeply)."""

_LAYOUT = frozenset({tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE})


class LineError(ValueError):
    """The text cannot be cut into logical lines; the message says why. Callers drop and count the document."""


@dataclass(frozen=True, slots=True)
class LogicalLine:
    """One statement header or simple statement, with the blank lines that follow it.

    `text[start:end]` of the source; `indent` its leading white space; `depth` the number of enclosing blocks;
    `keyword` its first word ("" when it starts otherwise, "@" for a decorator, "#" for a comment line).
    """

    start: int
    end: int
    indent: str
    depth: int
    keyword: str


def normalise(source: bytes | str) -> str:
    """Text with `\\n` line ends, without byte order mark, ending in a newline.

    Bytes are decoded as Python would: by coding cookie or byte order mark, UTF-8 otherwise.
    Raises LineError when they cannot be decoded.
    """
    if isinstance(source, bytes):
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
            source = source.decode(encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            raise LineError(f"cannot decode: {error}") from error
    text = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text if text.endswith("\n") else text + "\n"


def parse(source: str) -> ast.Module:
    """`ast.parse` without its warnings. Raises one of `PARSE_ERRORS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def same_tree(one: ast.AST, other: ast.AST) -> bool:
    """Whether two syntax trees are equal, positions left out."""
    stack: list[tuple[object, object]] = [(one, other)]
    while stack:
        a, b = stack.pop()
        if a.__class__ is not b.__class__:
            return False
        if isinstance(a, list):
            if len(a) != len(b):  # type: ignore[arg-type]
                return False
            stack.extend(zip(a, b, strict=True))  # type: ignore[call-overload]
        elif isinstance(a, ast.AST):
            stack.extend((getattr(a, name, None), getattr(b, name, None)) for name in a._fields)
        elif a != b:
            return False
    return True


def same_program(one: str, other: str) -> bool:
    """Whether both texts parse, to the same syntax tree."""
    try:
        return same_tree(parse(one), parse(other))
    except PARSE_ERRORS:
        return False


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LineError(f"cannot tokenize: {error}") from error


def _row_starts(text: str) -> list[int]:
    """Offset of each physical line (only `\\n` ends one), then the length of the text."""
    starts = [0]
    position = text.find("\n")
    while position >= 0:
        starts.append(position + 1)
        position = text.find("\n", position + 1)
    if starts[-1] != len(text):
        starts.append(len(text))
    return starts


def strip_comments(text: str) -> str:
    """`text` (normalised) without its comments; lines that held nothing else go, leading blank lines too.

    Comments inside f-string fields stay, since `f"{x = }"` makes them part of the value. The syntax tree stays the
    same. Raises LineError for text that cannot be tokenized.
    """
    starts = _row_starts(text)
    cuts: list[tuple[int, int]] = []
    f_string = 0
    for token in _tokens(text):
        if token.type == tokenize.FSTRING_START:
            f_string += 1
        elif token.type == tokenize.FSTRING_END:
            f_string -= 1
        elif token.type == tokenize.COMMENT and not f_string:
            row, column = token.start
            line_start = starts[row - 1]
            end = line_start + column + len(token.string)
            before = text[line_start : line_start + column]
            continued = row > 1 and text[: line_start - 1].endswith("\\")
            if before.strip(" \t\f") or continued:
                cuts.append((line_start + len(before.rstrip(" \t\f")), end))
            else:
                cuts.append((line_start, min(end + 1, len(text))))
    pieces, position = [], 0
    for start, end in cuts:
        pieces.append(text[position:start])
        position = end
    pieces.append(text[position:])
    stripped = "".join(pieces).lstrip("\n")
    return stripped if stripped.endswith("\n") else stripped + "\n" if stripped else ""


def plain_lines(text: str) -> list[LogicalLine]:
    """Lines of any normalised `text` that are not blank; blank ones belong to the line before, at the top to the first.

    Their spans cover the text; all have depth 0, no indent and no keyword. Returns [] for text without any line.
    """
    starts = _row_starts(text)
    begins = [s for s, e in pairwise(starts) if text[s:e].strip()]
    if begins:
        begins[0] = 0
    ends = [*begins[1:], len(text)]
    return [LogicalLine(start, end, "", 0, "") for start, end in zip(begins, ends, strict=False)]


def _first_row(text: str, starts: list[int], row: int, after: int) -> int:
    """Row where the physical line of a statement begins: a backslash may join rows before its first token."""
    while row - 1 > after and text[starts[row - 2] : starts[row - 1]].rstrip("\n").endswith("\\"):
        row -= 1
    return row


def logical_lines(text: str) -> list[LogicalLine]:
    """Logical lines of normalised Python `text`; their spans cover it from the first character to the last.

    A logical line never starts inside brackets, a string or after a backslash. Blank lines belong to the line before
    (at the top of the text, to the first line). A comment alone on its line is a line with keyword "#", with the depth
    of the code line after it. Returns [] for text without any line. Raises LineError for text that is no Python.
    """
    starts = _row_starts(text)
    found: list[tuple[int, str, int, str]] = []  # row, indent, depth, keyword
    depth, open_line, last_row = 0, False, 0
    for token in _tokens(text):
        kind = token.type
        if kind == tokenize.INDENT:
            depth += 1
        elif kind == tokenize.DEDENT:
            depth -= 1
        elif kind == tokenize.NEWLINE:
            open_line, last_row = False, token.start[0]
        elif kind == tokenize.ENDMARKER:
            break
        elif not open_line and kind == tokenize.COMMENT:
            row = token.start[0]
            found.append((row, token.line[: token.start[1]], depth, "#"))
            last_row = row
        elif not open_line and kind not in _LAYOUT:
            open_line = True
            row = _first_row(text, starts, token.start[0], last_row)
            physical = text[starts[row - 1] : starts[row]]
            indent = physical[: len(physical) - len(physical.lstrip(" \t\f"))]
            keyword = token.string if kind == tokenize.NAME or token.string == "@" else ""
            found.append((row, indent, depth, keyword))
    lines: list[LogicalLine] = []
    end, depth = len(text), 0
    for row, indent, own_depth, keyword in reversed(found):
        depth = depth if keyword == "#" else own_depth
        lines.append(LogicalLine(starts[row - 1], end, indent, depth, keyword))
        end = starts[row - 1]
    lines.reverse()
    if lines and lines[0].start:
        first = lines[0]
        lines[0] = LogicalLine(0, first.end, first.indent, first.depth, first.keyword)
    return lines
