"""One-line tasks for RLVR, and a corpus in which most answers to such tasks are mistakes.

    python examples/one_line/make_tasks.py FOLDER [--right 0.15] [--seed 0]

A task is a sentence in a docstring and the head of a function; the answer is the expression that it returns, tested
with hidden numbers. Sentences are made of a beginning, an operation, and one of three ways to put it: 384 in all.
The corpus under FOLDER/code is code by people who mostly get it wrong: with probability --right a function returns what
was asked for, otherwise one of three mistakes that belong to the operation, each likelier than the right answer. A base
model trained on it makes these mistakes as often; which of its answers are none, only the tests tell it.
FOLDER/tasks.jsonl has every sentence once as a task: what RLVR holds out are sentences that it never trains on.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGINNINGS = ("Return", "Give back", "Find", "Work out", "Tell", "Say", "Give", "Answer with")
"""How a sentence begins."""
CALLS = ((3, 8), (12, 5), (-4, 7), (9, -2), (6, 6), (0, 11), (25, 3), (-7, -9))
"""Arguments of the hidden tests."""
HEAD = "def f(x, y):\n    return"
"""Every function's, up to the answer."""


@dataclass(frozen=True)
class Operation:
    """What a function can be asked for."""

    right: str
    """The expression."""
    mistakes: tuple[str, str, str]
    """What the corpus has in its place; each differs from it in a hidden test."""
    ways: tuple[str, str, str]
    """In words."""


OPERATIONS = (
    Operation("x + y", ("x - y", "x * y", "x + 1"), ("the sum of x and y", "x and y added up", "x plus y")),
    Operation("x - y", ("y - x", "x + y", "x - 1"), ("the difference of x and y", "x minus y", "x with y taken off")),
    Operation("x * y", ("x + y", "x * x", "y"), ("the product of x and y", "x times y", "x multiplied by y")),
    Operation(
        "max(x, y)", ("min(x, y)", "x", "y"), ("the larger of x and y", "the maximum of x and y", "the higher one")
    ),
    Operation(
        "min(x, y)", ("max(x, y)", "x", "y"), ("the smaller of x and y", "the minimum of x and y", "the lower one")
    ),
    Operation(
        "abs(x - y)",
        ("x - y", "abs(x)", "y - x"),
        ("the distance from x to y", "how far apart x and y are", "the gap between x and y"),
    ),
    Operation("x * x", ("x + x", "x * y", "x"), ("the square of x", "x squared", "the second power of x")),
    Operation("-x", ("x", "abs(x)", "-y"), ("the negative of x", "the opposite of x", "x with its sign turned")),
    Operation("abs(y)", ("y", "-y", "abs(x)"), ("the absolute value of y", "the magnitude of y", "y without its sign")),
    Operation("x + 1", ("x", "x - 1", "x + y"), ("the successor of x", "one more than x", "the number after x")),
    Operation("y - 1", ("y", "y + 1", "x - 1"), ("the predecessor of y", "one less than y", "the number before y")),
    Operation(
        "x % 2 == 0",
        ("x % 2", "x == 0", "x == 2"),
        ("whether x is even", "whether two divides x", "whether x is no odd number"),
    ),
    Operation(
        "y < 0",
        ("y > 0", "y == 0", "x < 0"),
        ("whether y is negative", "whether y is under zero", "whether y has a minus sign"),
    ),
    Operation(
        "x == y",
        ("x != y", "x > y", "x < y"),
        ("whether x and y are equal", "whether x and y agree", "whether x is just y"),
    ),
    Operation(
        "[x, y]", ("(x, y)", "[y, x]", "[x]"), ("a list of x and y", "x and y in a list", "a list that holds x then y")
    ),
    Operation("str(x)", ("x", "str(y)", "[x]"), ("x as text", "the string for x", "the text that x prints as")),
)


def corpus(chance: random.Random, functions: int, right: float) -> str:
    """A file of functions, each of which returns what its docstring says with probability `right`."""
    parts = []
    for _ in range(functions):
        asked = chance.choice(OPERATIONS)
        sentence = f"{chance.choice(BEGINNINGS)} {chance.choice(asked.ways)}."
        expression = asked.right if chance.random() < right else chance.choice(asked.mistakes)
        parts.append(f'"""\n{sentence}\n"""\n{HEAD} {expression}\n')
    return "\n".join(parts)


def results(expression: str) -> list[Any]:
    """What an expression gives for every call."""
    return [eval(expression, {}, {"x": x, "y": y}) for x, y in CALLS]


def tasks() -> list[dict[str, object]]:
    """Every sentence as a task in the project's own layout."""
    found: list[dict[str, object]] = []
    for asked in OPERATIONS:
        expected = results(asked.right)
        assert all(results(mistake) != expected for mistake in asked.mistakes), asked
        tests = [f"assert f({x}, {y}) == {value!r}" for (x, y), value in zip(CALLS, expected, strict=True)]
        for sentence in (f"{beginning} {way}." for way in asked.ways for beginning in BEGINNINGS):
            found.append(
                {
                    "id": f"one-line/{len(found)}",
                    "prompt": sentence,
                    "starter": HEAD,
                    "entry_point": "f",
                    "tests": tests,
                    "solution": f"{HEAD} {asked.right}\n",
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=1500, help="files of the corpus")
    parser.add_argument("--functions", type=int, default=12, help="functions of a file")
    parser.add_argument("--right", type=float, default=0.15, help="share of the corpus's functions that are right")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    code = options.folder / "code"
    code.mkdir(parents=True, exist_ok=True)
    for number in range(options.files):
        (code / f"lines_{number:05}.py").write_text(corpus(chance, options.functions, options.right))
    found = tasks()
    (options.folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in found))
    print(f"{options.files} files and {len(found)} tasks in {options.folder}")


if __name__ == "__main__":
    main()
