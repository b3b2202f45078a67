"""Questions in the words of the reference evaluators, and the programs that answers make."""

from dataclasses import replace

import pytest

from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.evaluation.benchmarks.task import Task, TaskSet
from ra3_megatron.evaluation.prompts import program_of, question
from ra3_megatron.reward.problem import AssertTests, CallCase, CallTests, StdinCase, StdinTests

PROMPT = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """ Adds.\n    """\n'
HUMANEVAL = Task(
    id="HumanEval/0", benchmark="humaneval", number=0, prompt=PROMPT, form="code",
    tests=AssertTests("add", ("check(candidate)",)), entry_point="add",
)  # fmt: skip
MBPP = Task(
    id="Mbpp/11", benchmark="mbpp", number=10, prompt="Write a function to add.", form="text",
    tests=AssertTests("add", ("assert add(1, 2) == 3", "assert add(0, 0) == 0")), entry_point="add",
    examples=("assert add(1, 2) == 3", "assert add(0, 0) == 0"), reference="def add(a, b):\n    return a + b\n",
)  # fmt: skip
MBPP_PLUS = Task(
    id="Mbpp/11", benchmark="mbpp+", number=0, prompt='"""\nAdd.\nassert add(1, 2) == 3\n"""', form="docstring",
    tests=CallTests("add", (CallCase((1, 2), 3),)), visible=1, entry_point="add",
)  # fmt: skip
LCB = Task(
    id="q", benchmark="livecodebench", number=0, prompt="Print n + 1.", form="text",
    tests=StdinTests((StdinCase("1", "2"),)), visible=1,
)  # fmt: skip
SET = TaskSet("mbpp", (MBPP,), "", "", shots=(replace(MBPP, id="Mbpp/2", prompt="Write a function to shoot."),))
REFERENCE = EvaluationConfig(thoughts="reference")


def test_humaneval_is_asked_as_in_the_paper() -> None:
    """Raw prompt, five stop words; the program is prompt and answer."""
    asked = question(HUMANEVAL, SET, REFERENCE)
    assert asked.text == PROMPT
    assert asked.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert program_of(HUMANEVAL, asked, "    return a + b").program == PROMPT + "    return a + b"


def test_humaneval_stripped_ends_with_the_docstring() -> None:
    """A model whose tokenizer joins a line's end with the indentation took the raw prompt for finished: 0 of 164."""
    asked = question(HUMANEVAL, SET, replace(REFERENCE, humaneval_prompt="stripped"))
    assert asked.text == PROMPT.strip() != PROMPT
    assert program_of(HUMANEVAL, asked, "\n    return a + b").program == PROMPT.strip() + "\n    return a + b"


def test_thoughts_do_not_end_an_answer() -> None:
    """A model that thinks in comments was cut off at its first thought without indentation."""
    stop = question(HUMANEVAL, SET, EvaluationConfig()).stop
    assert stop == ("\nclass", "\ndef", "\nif", "\nprint")


def test_mbpp_few_shot() -> None:
    """The paper's form, solved problems first; all tests of the problem are shown."""
    asked = question(MBPP, SET, REFERENCE)
    assert asked.text == (
        "You are an expert Python programmer, and here is your task: Write a function to shoot. Your code should pass "
        "these tests:\n\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n[BEGIN]\ndef add(a, b):\n    return a + b\n"
        "[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to add. Your code should pass "
        "these tests:\n\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n[BEGIN]\n"
    )
    assert (asked.stop, asked.shown) == (("[DONE]",), 2)
    assert program_of(MBPP, asked, "def add(a, b): ...\n").program == "def add(a, b): ...\n"


def test_mbpp_docstring() -> None:
    """bigcode's form: text and the first test; the docstring is part of the program."""
    asked = question(MBPP, SET, replace(REFERENCE, mbpp_prompt="docstring"))
    assert asked.text == '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n'
    assert "\nassert" in asked.stop
    assert asked.shown == 1
    assert program_of(MBPP, asked, "def add(a, b): ...").program == asked.text + "def add(a, b): ..."


def test_evalplus_strips_its_prompts() -> None:
    """`prompt.strip() + newline`, and stop words of its own for each set."""
    asked = question(replace(HUMANEVAL, benchmark="humaneval+"), SET, REFERENCE)
    assert asked.text == PROMPT.strip() + "\n"
    assert "\nassert " in asked.stop
    asked = question(MBPP_PLUS, SET, REFERENCE)
    assert asked.text == MBPP_PLUS.prompt + "\n"
    assert ('\n"""' in asked.stop, asked.shown) == (True, 1)


def test_livecodebench_base_form() -> None:
    """One solved example, the problem, and nothing after `### Answer`."""
    asked = question(LCB, SET, REFERENCE)
    assert asked.text.count("### Question\n") == 2
    assert asked.text.endswith("### Question\nPrint n + 1.\n\n### Answer\n\n")
    assert asked.stop == ("###",)
    starter = "class Solution:\n    def f(self):\n        "
    asked = question(replace(LCB, starter=starter, entry_point="f"), SET, REFERENCE)
    assert asked.text.endswith(f"### Starter Code\n{starter}\n\n### Answer\n\n")


CHAT = EvaluationConfig(prompt="chat")


@pytest.mark.parametrize("task", [HUMANEVAL, MBPP, MBPP_PLUS, LCB])
def test_chat_questions_name_what_is_wanted(task: Task) -> None:
    """A request without the function's name gets a function of another name."""
    asked = question(task, SET, CHAT)
    assert task.entry_point is None or task.entry_point in asked.text
    assert "code" in asked.text
    assert asked.answer == "message"


def test_chat_answers_to_humaneval() -> None:
    """Imports of the prompt are kept; a body alone goes behind the prompt, indented or not."""
    asked = question(HUMANEVAL, SET, CHAT)
    whole = "```python\ndef add(a, b):\n    return a + b\n```"
    assert program_of(HUMANEVAL, asked, whole).program.startswith("from typing import List\n")
    body = program_of(HUMANEVAL, asked, "```python\nreturn a + b\n```").program
    assert body.startswith(PROMPT.rstrip())
    space: dict = {}
    exec(body, space)
    assert space["add"](1, 2) == 3


def test_parity_takes_livecodebenchs_rule() -> None:
    """There an answer whose block is not closed is an empty program."""
    asked = question(LCB, SET, CHAT)
    answer = "```python\nprint(1)\n"
    assert program_of(LCB, asked, answer, parity=True).program == ""
    assert program_of(LCB, asked, answer).program == "print(1)\n"


def test_repeated_prompts_and_empty_answers_are_noted() -> None:
    """What was unusual is counted in the results."""
    asked = question(HUMANEVAL, SET, REFERENCE)
    assert program_of(HUMANEVAL, asked, "\ndef add(a, b):\n    return 1\n").notes == ("prompt repeated",)
    assert program_of(HUMANEVAL, asked, "  ").notes == ("no code",)
