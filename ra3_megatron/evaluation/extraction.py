"""The program in an answer.

The rule, for answers to a request (chat):

1. Lines whose first characters are three or more backticks open and close code blocks; a block that is never closed
   goes to the end. A block marked with another language than Python counts only when there is no other.
2. Of several blocks the last one that defines the entry point is the program; where none does (or there is none to
   define), the last one that parses; else the last one.
3. Without a block: the whole answer when it parses; else the longest run of lines, beginning with a line that code
   begins with (an import, a definition, a decorator; for a program also any other), that parses.
4. A HumanEval answer that defines the entry point gets the imports and helpers of the prompt in front; one that is only
   a body goes behind the prompt.

An answer in completion form needs none of this: the program is the prompt's code and what followed it.
"""

import re
from dataclasses import dataclass

from ra3_megatron.evaluation.benchmarks.functions import defined_names, is_python

_FENCE = re.compile(r"[ \t]{0,3}(`{3,})[ \t]*([\w+-]*)[^`]*")
_PYTHON = ("", "python", "python3", "py")
_BEGINS = re.compile(r"(?:import|from|def|class|async def|@)\b|@")
_MOST_TRIES = 400
"""Runs of lines that are tried at most; an answer that is longer and holds no block is taken as it is."""


@dataclass(frozen=True)
class Extracted:
    """A program and how it was found."""

    program: str
    """Python source; empty when the answer held nothing."""
    notes: tuple[str, ...] = ()
    """What was unusual: `no code block`, `several code blocks`, `code block not closed`, `text around the code`,
    `entry point not defined`, `prompt repeated`, `no code`."""


@dataclass(frozen=True)
class _Block:
    language: str
    code: str
    closed: bool


def _blocks(answer: str) -> list[_Block]:
    found: list[_Block] = []
    lines: list[str] = []
    fence, language = "", ""
    for line in answer.splitlines():
        match = _FENCE.fullmatch(line)
        if match and not fence:
            fence, language, lines = match[1], match[2].lower(), []
        elif match and len(match[1]) >= len(fence) and not match[2]:
            found.append(_Block(language, "\n".join(lines) + "\n", True))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        found.append(_Block(language, "\n".join(lines) + "\n", False))
    return found


def extract(answer: str, entry_point: str | None) -> Extracted:
    """The program in an answer to a request, by the rule above; `entry_point` None for programs that read stdin."""
    fenced = _blocks(answer)
    blocks = [block for block in fenced if block.code.strip()]
    python = [block for block in blocks if block.language in _PYTHON]
    chosen = python or blocks
    if fenced and not blocks:
        return Extracted("", ("no code",))
    if not chosen:
        program, notes = _without_block(answer, entry_point)
    else:
        block = _best(chosen, entry_point)
        program = block.code
        notes = ["several code blocks"] if len(chosen) > 1 else []
        notes += [] if block.closed else ["code block not closed"]
    if not program.strip():
        return Extracted("", (*notes, "no code"))
    if entry_point is not None and entry_point not in _names(program):
        notes.append("entry point not defined")
    return Extracted(program, tuple(notes))


def _names(program: str) -> list[str]:
    """What a program defines; by its text where it does not parse."""
    names = defined_names(program)
    if "Solution" in names:
        # A method of LeetCode's class stands for the function.
        names += re.findall(r"^\s+def (\w+)\(", program, re.MULTILINE)
    return names or re.findall(r"^(?:async )?(?:def|class) (\w+)", program, re.MULTILINE)


def _best(blocks: list[_Block], entry_point: str | None) -> _Block:
    defining = [block for block in blocks if entry_point is not None and entry_point in _names(block.code)]
    parsing = [block for block in blocks if is_python(block.code)]
    return (defining or parsing or blocks)[-1]


def _without_block(answer: str, entry_point: str | None) -> tuple[str, list[str]]:
    notes = ["no code block"]
    if is_python(answer):
        return answer, notes
    lines = answer.splitlines()
    starts = [n for n, line in enumerate(lines) if _BEGINS.match(line)]
    if entry_point is None:
        starts += [n for n, line in enumerate(lines) if line and not line[0].isspace() and n not in starts]
    tries = 0
    best: tuple[int, str] = (0, "")
    for start in starts:
        for end in range(len(lines), start + best[0], -1):
            tries += 1
            if tries > _MOST_TRIES:
                return best[1] or answer, [*notes, *(["text around the code"] if best[1] else [])]
            run = "\n".join(lines[start:end]) + "\n"
            if is_python(run):
                best = (end - start, run)
                break
    return (best[1], [*notes, "text around the code"]) if best[1] else (answer, notes)


def between_last_fences(answer: str) -> str:
    """LiveCodeBench's own rule, for parity: the lines between the last two that hold three backticks; else nothing."""
    lines = answer.split("\n")
    fences = [n for n, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""
