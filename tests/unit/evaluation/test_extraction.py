"""The program in an answer: one block, two, none, one that is not closed, chatter around it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.evaluation.extraction import between_last_fences, extract

CODE = "def add(a, b):\n    return a + b\n"
OTHER = "def mul(a, b):\n    return a * b\n"


def block(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}```\n"


@pytest.mark.parametrize(
    ("answer", "program", "notes"),
    [
        (block(CODE), CODE, ()),
        ("Here it is:\n" + block(CODE) + "I hope it helps.\n", CODE, ()),
        (block(OTHER) + "and\n" + block(CODE), CODE, ("several code blocks",)),
        (block(CODE) + "used so:\n" + block("print(add(1, 2))\n"), CODE, ("several code blocks",)),
        (block(CODE.replace("+", "-")) + "no, rather\n" + block(CODE), CODE, ("several code blocks",)),
        (block("$ pip install x\n", "bash") + block(CODE), CODE, ()),
        ("```python\n" + CODE, CODE, ("code block not closed",)),
        (CODE, CODE, ("no code block",)),
        ("Sure!\n" + CODE + "This adds, doesn't it?\n", CODE, ("no code block", "text around the code")),
        (block(OTHER), OTHER, ("entry point not defined",)),
        ("", "", ("no code block", "no code")),
        ("```python\n```\n", "", ("no code",)),
        ("````python\n" + CODE + "````\n", CODE, ()),
    ],
)
def test_answers(answer: str, program: str, notes: tuple[str, ...]) -> None:
    """Each row is an answer for which a neighbour's rule takes another program, or nothing."""
    found = extract(answer, "add")
    assert (found.program.strip(), found.notes) == (program.strip(), notes)


def test_a_method_of_the_class_is_the_entry_point() -> None:
    """LeetCode's class was said not to define its function."""
    code = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    assert extract(block(code), "add").notes == ()


def test_programs_that_read_input_need_no_definition() -> None:
    """Statements alone are a program, also without a block and with chatter around them."""
    code = "n = int(input())\nprint(n + 1)\n"
    assert extract(block(code), None).program == code
    assert extract("Here you go:\n" + code + "That's it, isn't it?\n", None).program == code


def test_livecodebench_rule() -> None:
    """Parity: the lines between the last two fences; a block that is not closed is nothing."""
    assert between_last_fences("a\n" + block(OTHER) + block(CODE)) == CODE.rstrip("\n")
    assert between_last_fences("```python\n" + CODE) == ""


@given(st.text(alphabet="`\n abdef():py", max_size=120))
def test_anything_gives_some_program(answer: str) -> None:
    """An answer of nonsense raised an error in the middle of an evaluation."""
    extract(answer, "add")
    extract(answer, None)


def test_long_answers_without_a_block_end() -> None:
    """Every run of lines was parsed: minutes for one answer."""
    extract("def f(:\n" * 3000, "f")
