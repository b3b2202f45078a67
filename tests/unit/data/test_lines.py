"""Logical lines and comment stripping, on constructed cases and on real files."""

import io
import tokenize

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ra3_megatron.data.blocks import NO_CUT, cut_depths, split_ranges, surroundings
from ra3_megatron.data.lines import (
    PARSE_ERRORS,
    LineError,
    logical_lines,
    normalise,
    parse,
    same_program,
    strip_comments,
)


def texts(code: str) -> list[str]:
    return [code[line.start : line.end] for line in logical_lines(code)]


def test_lines_of_brackets_strings_and_backslashes() -> None:
    """A comment put inside a bracket's, string's or joined line would change or break the program."""
    code = 'x = [\n  1,\n]\n\ny = """a\n# no\n"""\nz = 1 + \\\n  2\n@d\ndef f(): pass\n'
    assert texts(code) == [
        "x = [\n  1,\n]\n\n", 'y = """a\n# no\n"""\n', "z = 1 + \\\n  2\n", "@d\n", "def f(): pass\n",
    ]  # fmt: skip
    assert [line.keyword for line in logical_lines(code)] == ["x", "y", "z", "@", "def"]


def test_line_that_begins_with_a_backslash() -> None:
    """The tokenizer reports the first token's row; the line begins a row earlier."""
    code = "if x:\n    \\\n    y = 1\nz = 2\n"
    assert texts(code) == ["if x:\n", "    \\\n    y = 1\n", "z = 2\n"]


def test_blank_lines_at_the_top_belong_to_the_first_line() -> None:
    assert texts("\n\nx = 1\n\n") == ["\n\nx = 1\n\n"]
    assert logical_lines("\n  \n") == []


@pytest.mark.parametrize(
    ("code", "stripped"),
    [
        ("# head\n\nx = 1  # tail\n", "x = 1\n"),
        ("x = [\n    # only\n    1,  # one\n]\n", "x = [\n    1,\n]\n"),
        ('s = "# no"\n', 's = "# no"\n'),
        ("x = 1 \\\n  # joined\ny = 2\n", "x = 1 \\\n\ny = 2\n"),
        ('f"""{x = # in\n}"""\n', 'f"""{x = # in\n}"""\n'),
        ("# nothing else\n", ""),
    ],
)
def test_strip_comments(code: str, stripped: str) -> None:
    """A comment-only row after a backslash must leave its line end, or two statements become one."""
    assert strip_comments(code) == stripped


def test_every_kind_of_source_is_cut_or_refused(stdlib_paths: list) -> None:
    """Odd encodings, form feeds, tabs and files for other Python versions must be counted, never crash."""
    refused = 0
    odd = [p for p in stdlib_paths if p.parent.name in ("tokenizedata", "encoded_modules") or "bad" in p.name]
    for path in odd + [p for p in stdlib_paths if p.stat().st_size < 50_000][:60]:
        try:
            code = normalise(path.read_bytes())
            tree_exists = parse(code) is not None
            assert "".join(texts(code)) == code or not code.strip()
            stripped = strip_comments(code)
        except (LineError, *PARSE_ERRORS):
            refused += 1
            continue
        assert tree_exists
        assert same_program(code, stripped), path
        kept = [t for t in tokenize.generate_tokens(io.StringIO(stripped).readline) if t.type == tokenize.COMMENT]
        assert not kept or "{" in stripped
    assert 0 < refused < 20


def test_undecodable_and_nul_are_refused() -> None:
    with pytest.raises(LineError, match="decode"):
        normalise(b"# coding: utf-8\nx = '\xff'\n")
    with pytest.raises(LineError):
        logical_lines("x = (\n")
    assert normalise(b"\xef\xbb\xbfx = 1\r\ny = 2\r") == "x = 1\ny = 2\n"
    assert normalise("# coding: latin-1\nx = 'é'".encode("latin-1")) == "# coding: latin-1\nx = 'é'\n"


COMPOUND = """\
@d
# about f
@e
def f(a):
    try:
        for i in a:
            if i:
                break
        else:
            g()
    except* E:
        h()
    else:
        k()
    finally:
        m()
    match a:
        case 1:
            x = 1
        case _:
            y = 2
    case = 3
async def q():
    async with a as b:
        async for c in b:
            await c
    while a:
        pass
    else:
        z = 1
class C:
\ttry:
\t\tpass
\texcept A:
\t\tpass
"""


def test_no_piece_starts_inside_a_statement() -> None:
    """`else`, `except`, `case` … cannot start a piece, nor what follows a decorator; `case = 3` can."""
    lines = logical_lines(COMPOUND)
    cuts = cut_depths(lines)
    for line, cut in zip(lines, cuts, strict=True):
        code = COMPOUND[line.start : line.end].strip()
        if code.startswith(("else", "except", "finally", "case 1", "case _", "# about", "@e", "def f")):
            assert cut == NO_CUT, code
        else:
            assert cut == line.depth, code


def test_every_legal_piece_is_a_program_with_its_surroundings() -> None:
    """All pairs of legal cuts of a program with every compound statement."""
    lines = logical_lines(COMPOUND)
    legal = [i for i, cut in enumerate(cut_depths(lines)) if cut != NO_CUT] + [len(lines)]
    for n, start in enumerate(legal):
        for end in legal[n + 1 :]:
            prefix, suffix = surroundings(COMPOUND, lines, start, end)
            stop = lines[end].start if end < len(lines) else len(COMPOUND)
            parse(prefix + COMPOUND[lines[start].start : stop] + suffix)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_of_real_files_are_programs(data: st.DataObject, stdlib_texts: list[str]) -> None:
    code = data.draw(st.sampled_from(stdlib_texts))
    if data.draw(st.booleans()):
        code = strip_comments(code)
    limit = data.draw(st.integers(20, 3000))
    lines = logical_lines(code)
    lengths = np.array([line.end - line.start for line in lines])
    ranges, lost = split_ranges(lengths, cut_depths(lines), limit)
    assert sum(b - a for a, b in ranges) + lost == len(lines)
    for start, end in ranges:
        assert lengths[start:end].sum() <= limit
        prefix, suffix = surroundings(code, lines, start, end)
        parse(prefix + code[lines[start].start : lines[end - 1].end] + suffix)
