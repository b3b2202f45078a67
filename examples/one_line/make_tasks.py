"""One-line tasks for RLVR, and a corpus whose answers to such tasks are only sometimes right.

    python examples/one_line/make_tasks.py FOLDER [--right 0.18] [--seed 0]

A task is a docstring and the head of a function; the answer is the expression that it returns, tested with hidden
numbers. The corpus under FOLDER/code shows the form, and the expressions in it are seldom right: most have a slip. A
base model trained on it writes what it has seen, slips and all; that it should not, it can only learn from the tests.
FOLDER/tasks.jsonl has the tasks.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NAMES = ("x", "y")
"""What arguments are called, in either order."""
NUMBERS = (2, 5, 10)
"""Numbers in tasks."""
CALLS = ((3, 8), (12, 5), (-4, 7), (9, -2), (6, 6), (0, 11), (25, 3), (-7, -9))
"""Arguments of the hidden tests."""


@dataclass(frozen=True)
class Operation:
    """What a function can be asked for."""

    remark: str
    """In words; {x}, {y} are the arguments' names, {n} a number."""
    expression: str
    """The same as Python."""


OPERATIONS = (
    Operation("the sum of {x} and {y}", "{x} + {y}"),
    Operation("{x} less {y}", "{x} - {y}"),
    Operation("the product of {x} and {y}", "{x} * {y}"),
    Operation("the larger of {x} and {y}", "max({x}, {y})"),
    Operation("the smaller of {x} and {y}", "min({x}, {y})"),
    Operation("{n} more than {x}", "{x} + {n}"),
    Operation("{n} less than {x}", "{x} - {n}"),
    Operation("{n} times {x}", "{x} * {n}"),
    Operation("what {x} leaves when divided by {n}", "{x} % {n}"),
    Operation("how often {n} goes into {x}", "{x} // {n}"),
    Operation("the square of {y}", "{y} * {y}"),
    Operation("{x} with the sign turned", "-{x}"),
    Operation("the distance from {x} to {y}", "abs({x} - {y})"),
    Operation("whether {x} is above {n}", "{x} > {n}"),
    Operation("whether {x} and {y} are equal", "{x} == {y}"),
    Operation("a list of {x} and {y}", "[{x}, {y}]"),
)


SLIPS = ("{e} + 1", "{e} - 1", "-({e})", "[{e}]", "not {e}")
"""What is wrong with an expression {e} of the corpus that is not right."""


@dataclass(frozen=True)
class Asked:
    """One task."""

    problem: str
    """What the function returns, in words."""
    head: str
    """Its head, up to the answer."""
    fill: Callable[[str], str]
    """Puts names and numbers into a template."""
    operation: Operation


def ask(chance: random.Random) -> Asked:
    """A task with names and a number of its own."""
    x, y = chance.sample(NAMES, 2)
    n = chance.choice(NUMBERS)
    operation = chance.choice(OPERATIONS)

    def fill(template: str) -> str:
        return template.format(x=x, y=y, n=n)

    return Asked(fill(operation.remark), f"def f({x}, {y}):\n    return", fill, operation)


def corpus(chance: random.Random, functions: int, right: float) -> str:
    """A file of functions, each of which returns what its remark says with probability `right`."""
    parts = []
    for _ in range(functions):
        asked = ask(chance)
        expression = asked.fill(asked.operation.expression)
        if chance.random() > right:
            expression = chance.choice(SLIPS).format(e=expression)
        parts.append(f'"""\n{asked.problem}\n"""\n{asked.head} {expression}\n')
    return "\n".join(parts)


def task(chance: random.Random, number: int) -> dict[str, object]:
    """A task in the project's own layout."""
    asked = ask(chance)
    solution = f"{asked.head} {asked.fill(asked.operation.expression)}\n"
    namespace: dict[str, Callable[[int, int], object]] = {}
    exec(solution, namespace)
    return {
        "id": f"one-line/{number}",
        "prompt": asked.problem,
        "starter": asked.head,
        "entry_point": "f",
        "tests": [f"assert f({a}, {b}) == {namespace['f'](a, b)!r}" for a, b in CALLS],
        "solution": solution,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=600, help="files of the corpus")
    parser.add_argument("--functions", type=int, default=12, help="functions of a file")
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--right", type=float, default=0.18, help="share of the corpus's functions that are right")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    code = options.folder / "code"
    code.mkdir(parents=True, exist_ok=True)
    for number in range(options.files):
        (code / f"lines_{number:05}.py").write_text(corpus(chance, options.functions, options.right))
    # A task may come twice as a text; as a draw of the generator it is another task all the same.
    lines = [json.dumps(task(chance, number)) for number in range(options.tasks)]
    (options.folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{options.files} files and {options.tasks} tasks in {options.folder}")


if __name__ == "__main__":
    main()
