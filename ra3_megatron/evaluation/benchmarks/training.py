"""Task sets for reinforcement learning: AceCode-87K, DeepCoder-Preview, AReaL-boba-2, and a simple layout of ours."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ra3_megatron.evaluation.benchmarks.functions import defined_names, entry_point_of, import_lines
from ra3_megatron.evaluation.benchmarks.livecodebench import PRELUDE, case_tests
from ra3_megatron.evaluation.benchmarks.rows import Hub, Row, shown
from ra3_megatron.evaluation.benchmarks.task import Task, digest_of
from ra3_megatron.reward.problem import AssertTests, CallCase, CallTests, StdinCase, StdinTests, Tests

ACECODE_FILES = ("AceCode-87K/data/train-*.parquet", "acecode/*.parquet", "acecode*.jsonl*")
ACECODE_HUB = Hub("TIGER-Lab/AceCode-87K", splits=("train",))
DEEPCODER_FILES = ("DeepCoder-Preview-Dataset/*/train-*.parquet", "deepcoder/*.parquet", "deepcoder*.jsonl*")
DEEPCODER_HUB = Hub("agentica-org/DeepCoder-Preview-Dataset", "primeintellect", ("train",))
AREAL_FILES = ("AReaL-boba-2-RL-Code/train/*.jsonl", "areal/*.jsonl*", "areal*.jsonl*")
AREAL_HUB = Hub("inclusionAI/AReaL-boba-2-RL-Code", splits=("train",), files="train/train.jsonl")
TASK_FILES = ("tasks.jsonl", "tasks.jsonl.gz")

_APPS_ORACLE = '''
def accept(args, answer, expected):
    """Answers of such data sets stand alone or in a list of one; tuples count as lists."""
    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value
    answer, expected = plain(answer), plain(expected)
    return answer == expected or (isinstance(expected, list) and len(expected) == 1 and answer == expected[0])
'''


def read_acecode(rows: Sequence[Row]) -> tuple[list[Task], dict[str, int]]:
    """AceCode-87K (Zeng et al. 2025, arXiv 2502.01718): question and test_cases, a list of asserts.

    Tasks whose asserts do not agree on a function are left out and counted: the set is made by a model.
    """
    tasks: list[Task] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        asserts = row.texts("test_cases")
        name = entry_point_of(asserts)
        if name is None:
            dropped["its tests call no one function"] += 1
            continue
        tasks.append(
            Task(
                id=row.text("id"),
                benchmark="acecode",
                number=number,
                prompt=row.text("question"),
                form="text",
                tests=AssertTests(name, tuple(asserts)),
                entry_point=name,
                examples=(asserts[0],),
            )
        )
    return tasks, dict(dropped)


def read_deepcoder(rows: Sequence[Row]) -> tuple[list[Task], dict[str, int]]:
    """DeepCoder-Preview: problem and tests, in one of its four subsets' forms; starter_code where there is one."""
    return [_deepcoder(number, row) for number, row in enumerate(rows)], {}


def _deepcoder(number: int, row: Row) -> Task:
    problem, tests = row.text("problem"), row.json("tests")
    starter = row.text("starter_code", "")
    metadata = row.json("metadata") if row.values.get("metadata") else {}
    function = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    solutions = row.items("solutions", []) if row.values.get("solutions") is not None else []
    found = _apps(row, tests) if isinstance(tests, Mapping) else _listed(row, tests, function)
    return Task(
        id=str(row.values.get("id") or _made_id("deepcoder", problem)),
        benchmark="deepcoder",
        number=number,
        prompt=problem,
        form="text",
        tests=found,
        entry_point=getattr(found, "entry_point", None),
        starter=starter,
        reference=_code_in(solutions[0]) if solutions and isinstance(solutions[0], str) else "",
    )


def read_areal(rows: Sequence[Row]) -> tuple[list[Task], dict[str, int]]:
    """AReaL-boba-2: prompt and input_output, JSON with inputs, outputs and, for functions, fn_name."""
    tasks = []
    for number, row in enumerate(rows):
        prompt, content = row.text("prompt"), row.json("input_output")
        if not isinstance(content, Mapping):
            raise row.refuse(f"field input_output holds {shown(content)}, not an object with inputs and outputs")
        tests = _apps(row, content)
        tasks.append(
            Task(
                id=str(row.values.get("query_id") or row.values.get("id") or _made_id("areal", prompt)),
                benchmark="areal",
                number=number,
                prompt=prompt,
                form="text",
                tests=tests,
                entry_point=getattr(tests, "entry_point", None),
            )
        )
    return tasks, {}


def _made_id(name: str, text: str) -> str:
    """An id for rows that have none: the same text has the same one in every file."""
    return f"{name}/{digest_of([text])[:16]}"


def _code_in(text: str) -> str:
    """A solution, out of its code block if it stands in one."""
    body = text.strip()
    if body.startswith("```"):
        body = body.split("\n", 1)[-1].rsplit("```", 1)[0]
    return body.strip() + "\n"


def _apps(row: Row, content: Mapping[str, Any]) -> Tests:
    """APPS' form: lists of inputs and outputs side by side."""
    inputs, outputs = content.get("inputs"), content.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise row.refuse("its tests need lists of inputs and outputs, equally long and not empty")
    name = content.get("fn_name")
    if name is None:
        pairs = zip(inputs, outputs, strict=True)
        return StdinTests(tuple(StdinCase(_joined(row, i), _joined(row, o)) for i, o in pairs))
    return _called(row, str(name), inputs, outputs)


def _joined(row: Row, text: Any) -> str:
    """Text of standard input or output; some rows hold its lines as a list."""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "\n".join(text) + "\n"
    if not isinstance(text, str):
        raise row.refuse(f"a test of standard input holds {shown(text)}, not text")
    return text


def _called(row: Row, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> CallTests:
    cases = []
    for given, wanted in zip(inputs, outputs, strict=True):
        if isinstance(given, str):
            try:
                given = [json.loads(line) for line in given.split("\n")]
            except ValueError as error:
                raise row.refuse(f"a test of {name} is not JSON, one value per line ({error})") from None
        if not isinstance(given, list):
            raise row.refuse(f"a test of {name} holds {shown(given)}, not a list of arguments")
        cases.append(CallCase(tuple(given), wanted))
    return CallTests(name, tuple(cases), compare="json", oracle=_APPS_ORACLE, setup=PRELUDE)


def _listed(row: Row, tests: Any, function: str | None) -> Tests:
    """A list of tests, each an object; all of one kind."""
    if not isinstance(tests, list) or not tests or not all(isinstance(test, Mapping) for test in tests):
        raise row.refuse(f"field tests holds {shown(tests)}, not a list of tests, or none")
    if any("input" not in test or "output" not in test for test in tests):
        raise row.refuse("a test lacks its input or its output")
    kinds = {str(test.get("type") or test.get("testtype") or "stdin_stdout") for test in tests}
    if len(kinds) > 1:
        raise row.refuse(f"its tests are of several kinds ({', '.join(sorted(kinds))})")
    (kind,) = kinds
    if kind == "function_call":
        name = tests[0].get("fn_name")
        if not name:
            raise row.refuse("its tests call a function, and fn_name is missing")
        return _called(row, str(name), [t["input"] for t in tests], [t["output"] for t in tests])
    if kind == "functional":
        inner = tests[0].get("metadata")
        name = function or (inner.get("func_name") if isinstance(inner, Mapping) else None)
        if not name:
            raise row.refuse("its tests call a function, and func_name is missing")
        return case_tests(row, [dict(test) for test in tests], str(name))
    return StdinTests(tuple(StdinCase(_joined(row, t["input"]), _joined(row, t["output"])) for t in tests))


# ------------------------------------------------------------------------------------------------------- our layout


def read_tasks(rows: Sequence[Row]) -> tuple[list[Task], dict[str, int]]:
    """Our own layout: id, prompt, and either entry_point with tests (asserts) or stdin, a list of {input, output}.

    Optional: setup (trusted code before the tests), starter, solution, visible (so many tests are shown).
    """
    return [_own(number, row) for number, row in enumerate(rows)], {}


def _own(number: int, row: Row) -> Task:
    solution, entry_point = row.text("solution", ""), row.values.get("entry_point")
    tests: Tests
    shown_tests: tuple[str, ...] = ()
    if entry_point is not None:
        name = row.text("entry_point")
        asserts = row.texts("tests")
        if entry_point_of(asserts, f"def {name}(): ...") is None:
            raise row.refuse(f"entry_point is {name!r}, but no test calls it")
        if solution and name not in defined_names(solution):
            raise row.refuse(f"entry_point is {name!r}, but solution does not define it")
        tests = AssertTests(name, tuple(asserts), f"{import_lines(solution)}\n{row.text('setup', '')}\n")
        shown_tests = tuple(asserts)
    else:
        pairs = row.items("stdin")
        if not pairs or not all(isinstance(p, Mapping) and {"input", "output"} <= p.keys() for p in pairs):
            raise row.refuse("it needs entry_point and tests, or stdin, a list of {input, output}, not empty")
        tests = StdinTests(tuple(StdinCase(_joined(row, p["input"]), _joined(row, p["output"])) for p in pairs))
    visible = row.number("visible", 0) or 0
    return Task(
        id=row.text("id"),
        benchmark="tasks",
        number=number,
        prompt=row.text("prompt"),
        form="text",
        tests=tests,
        visible=int(visible),
        entry_point=entry_point,
        starter=row.text("starter", ""),
        examples=shown_tests[: int(visible)],
        reference=solution,
    )
