"""Programs that try to be paid without solving the task, and how cases are made of them.

An attack is a body of statements. It is run at import, in the call, or is the whole program, and against each kind of
tests: asserts, calls with plain answers, standard input. `cheats.py` holds the groups 1 to 3, `thefts.py` 4 and 5,
`resources.py` 6, `escapes.py` 7.
"""

import secrets
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    Limits,
    Outcome,
    StdinCase,
    StdinTests,
    Submission,
    Tests,
)

Kind = Literal["asserts", "calls", "stdin"]
ALL: tuple[Kind, ...] = ("asserts", "calls", "stdin")
FUNCTION: tuple[Kind, ...] = ("asserts", "calls")
LIMITS = Limits(cpu_s=0.4, wall_s=60.0, memory_mb=512, output_bytes=1 << 16)
"""For programs that should end by themselves: small, so that one that does not costs little."""

ADD: dict[Kind, Tests] = {
    "asserts": AssertTests(
        "add", ("assert candidate(2, 3) == 5", "assert candidate(-1, 1) == 0", "assert abs(add(7, 0.5) - 7.5) < 1e-6")
    ),
    "calls": CallTests("add", (CallCase((2, 3), 5), CallCase((-1, 1), 0), CallCase((100, 23), 123))),
    "stdin": StdinTests((StdinCase("2 3\n", "5\n"), StdinCase("-1 1\n", "0\n"), StdinCase("100 23\n", "123\n"))),
}
"""The task that a cheat pretends to solve: the sum of two numbers."""
RIGHT = """
import json, math, random, re, collections

def add(a, b):
    return a + b

if __name__ == "__main__":
    import sys
    line = sys.stdin.readline()
    if line:
        print(add(*map(int, line.split())))
"""
"""Solves it as a function and as a program; leans on modules that others may have tampered with."""


def secret_task(token: str) -> dict[Kind, Tests]:
    """Tests whose answers hold `token`, which no program can guess: whoever passes has read it somewhere."""
    answers = [f"ANSWER-{token}-{n}" for n in range(3)]
    return {
        "asserts": AssertTests("add", tuple(f"assert candidate({n}, 0) == {a!r}" for n, a in enumerate(answers))),
        "calls": CallTests("add", tuple(CallCase((n, 0), a) for n, a in enumerate(answers))),
        "stdin": StdinTests(tuple(StdinCase(f"{n} 0\n", f"{a}\n") for n, a in enumerate(answers))),
    }


SECRET: dict[Kind, Tests] = secret_task("the token of the canaries")
"""Filled in when the submission is made."""
YES: dict[Kind, Tests] = {
    "asserts": AssertTests("add", ("assert candidate(1, 2) == 'yes'",)),
    "calls": CallTests("add", (CallCase((1, 2), "yes"),)),
    "stdin": StdinTests((StdinCase("1 2\n", "yes\n"),)),
}
"""Passed by a program that says yes: an attack says it when it has got through."""


@dataclass(frozen=True)
class Attack:
    """One attack; `{name}` of the canaries is filled into `body` before it is run."""

    name: str
    group: int
    """Of the list in the documentation: 1 exit, 2 forged answers, 3 forged protocol, 4 stolen tests, 5 patched
    functions, 6 resources, 7 escape."""
    body: str
    """Statements."""
    places: tuple[str, ...]
    """`import`: run when the program is loaded; `call`: run inside `add`; `program`: defines `add` itself."""
    kinds: tuple[Kind, ...]
    """Tests it is run against; with `stdin`, what `add` gives for the numbers read is printed."""
    ends: tuple[Outcome, ...]
    """How it may end; anything else says that it was not the attack that it is meant to be."""
    plain: tuple[Kind, ...]
    """Kinds of tests for which a plain runner pays it: what shows that the attack is real."""
    tests: dict[Kind, Tests]
    limits: Limits


def parse(
    group: int,
    text: str,
    *,
    macros: dict[str, str] | None = None,
    wrap: Callable[[str], str] = lambda body: body,
    places: tuple[str, ...] = ("program",),
    kinds: tuple[Kind, ...] = ALL,
    ends: tuple[Outcome, ...] = (Outcome.WRONG,),
    plain: tuple[Kind, ...] = (),
    tests: dict[Kind, Tests] = ADD,
) -> tuple[Attack, ...]:
    """Attacks from text: each begins with `#: name`, and with what differs from the arguments for it.

    `places=`, `kinds=`, `ends=`, `plain=` (values between commas, or `no`); `tests=` (add, yes, secret); `cpu=`,
    `wall=` (seconds), `memory=` (MiB). Lines that are the name of a macro stand for its text.
    """
    attacks = []
    for section in text.strip("\n").removeprefix("#: ").split("\n#: "):
        head, _, body = section.partition("\n")
        name, *words = head.split()
        given = dict(word.split("=") for word in words)
        lists = {key: tuple(w for w in value.split(",") if w != "no") for key, value in given.items()}
        lines = [(macros or {}).get(line.strip(), line).strip("\n") for line in body.split("\n")]
        attacks.append(
            Attack(
                name,
                group,
                wrap("\n".join(lines)),
                lists.get("places", places),
                cast(tuple[Kind, ...], lists.get("kinds", kinds)),
                tuple(map(Outcome, lists["ends"])) if "ends" in lists else ends,
                cast(tuple[Kind, ...], lists.get("plain", plain)),
                {"add": ADD, "yes": YES, "secret": SECRET}[given["tests"]] if "tests" in given else tests,
                replace(
                    LIMITS,
                    cpu_s=float(given.get("cpu", LIMITS.cpu_s)),
                    wall_s=float(given.get("wall", LIMITS.wall_s)),
                    memory_mb=int(given.get("memory", LIMITS.memory_mb)),
                ),
            )
        )
    return tuple(attacks)


@dataclass(frozen=True)
class Case:
    """An attack at one place against one kind of tests."""

    attack: Attack
    place: str
    kind: Kind

    @property
    def name(self) -> str:
        """Of the test."""
        return f"{self.attack.group}-{self.attack.name}-{self.place}-{self.kind}"

    def program(self) -> str:
        """Source of the program."""
        body = self.attack.body
        main = "\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))\n"
        if self.place == "import":
            text = f"{body}\n\ndef add(a, b):\n    return None\n"
        elif self.place == "call":
            text = f"def add(a, b):\n{textwrap.indent(body, '    ')}\n    return None\n"
        else:
            text = f"{body}\n"
        return text + (main if self.kind == "stdin" else "")

    def submission(self, canaries: dict[str, str]) -> Submission:
        """What the judge is given; `canaries` fills the names in braces."""
        program = self.program()
        for name, value in canaries.items():
            program = program.replace(f"{{{name}}}", value)
        return Submission(program, tests_for(self, canaries), self.attack.limits, self.name)


def tests_for(case: Case, canaries: dict[str, str]) -> Tests:
    """The tests of a case; `SECRET` ones hold the canary's token."""
    return (secret_task(canaries["token"]) if case.attack.tests is SECRET else case.attack.tests)[case.kind]


def control(kind: Kind) -> Submission:
    """The right program, which must pass whatever was judged before it."""
    return Submission(RIGHT, ADD[kind], replace(LIMITS, cpu_s=4.0), "control")


def expand(attacks: tuple[Attack, ...]) -> list[Case]:
    """Every case of some attacks."""
    return [Case(attack, place, kind) for attack in attacks for place in attack.places for kind in attack.kinds]


def new_token() -> str:
    """Something nobody can guess."""
    return secrets.token_hex(8)
