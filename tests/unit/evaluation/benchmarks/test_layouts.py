"""Readers of task files: every layout, and what is refused."""

import base64
import gzip
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.benchmarks.registry import Source, find_files, load_tasks
from ra3_megatron.evaluation.benchmarks.task import Task, cut_tests, hidden_tests, submission, visible_tests
from ra3_megatron.reward.problem import AssertTests, CallTests, Limits, StdinTests

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    """Adds one."""\n',
    "entry_point": "f",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == helper(2)\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "import sys\r\ndef sum(a, b):\r\n  return a + b",
    "test_list": ["assert sum(1, 2) == 3", "assert sum(0, 0) == 0"],
    "test_setup_code": "",
}
PUBLIC = [{"input": "1\n2", "output": "3", "testtype": "functional"}]
LCB = {
    "question_id": "q1",
    "question_content": "Add.",
    "contest_date": "2024-05-01T00:00:00",
    "platform": "leetcode",
    "difficulty": "easy",
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    "public_test_cases": json.dumps(PUBLIC),
    "private_test_cases": json.dumps([{"input": "2\n2", "output": "4", "testtype": "functional"}]),
    "metadata": '{"func_name": "add"}',
}
CODEFORCES = {
    "id": "1/A", "title": "Sum", "description": "Print the sum.", "time_limit": 1.0, "memory_limit": 256.0,
    "rating": 800, "input_mode": "stdio", "official_tests_complete": True, "generated_checker": None,
    "examples": [{"input": "1 2\n", "output": "3\n"}],
    "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}],
}  # fmt: skip
OWN = {"id": "one", "prompt": "Add.", "entry_point": "add", "tests": ["assert add(1, 2) == 3"]}


def written(folder: Path, rows: list[Any], name: str = "tasks.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, layout: str, rows: list[Any], **source: Any) -> tuple[Task, ...]:
    return load_tasks(layout, Source(str(written(folder, rows)), **source)).tasks


def test_humaneval_tests_know_the_helpers_of_the_prompt(tmp_path: Path) -> None:
    """HumanEval 32, 38 and 50 call a function of the prompt in their tests, and failed with a NameError."""
    (task,) = read(tmp_path, "humaneval", [HUMANEVAL])
    assert isinstance(task.tests, AssertTests)
    assert "def helper" in task.tests.setup
    assert "def f(" not in task.tests.setup
    assert task.reference.endswith("return x + 1\n")


def test_mbpp_functions_may_have_the_name_of_a_builtin(tmp_path: Path) -> None:
    """A task whose function is called `sum` was refused as calling nothing."""
    shots = [{**MBPP, "task_id": n} for n in (2, 3, 4)]
    tasks = load_tasks("mbpp", Source(str(written(tmp_path, [*shots, MBPP]))))
    (task,) = tasks.tasks
    assert task.entry_point == "sum"
    assert [shot.id for shot in tasks.shots] == ["Mbpp/2", "Mbpp/3", "Mbpp/4"]
    assert "\r" not in task.reference
    assert isinstance(task.tests, AssertTests)
    assert "import sys" in task.tests.setup


def test_mbpp_parts_do_not_overlap(tmp_path: Path) -> None:
    """Training tasks that were test problems too made a score worthless."""
    rows = [{**MBPP, "task_id": n} for n in (1, 2, 10, 11, 510, 511, 600, 601, 974)]
    ids = {name: [t.facts["task_id"] for t in read(tmp_path, name, rows)] for name in ("mbpp", "mbpp_train")}
    assert ids == {"mbpp": [11, 510], "mbpp_train": [601, 974, 511, 600]}


@pytest.mark.parametrize("packed", [False, True])
def test_livecodebench_functional(tmp_path: Path, packed: bool) -> None:
    """Private tests come as JSON or as a compressed pickle; the visible ones are the public ones."""
    row = dict(LCB)
    if packed:
        pickled = pickle.dumps(LCB["private_test_cases"])
        row["private_test_cases"] = base64.b64encode(zlib.compress(pickled)).decode()
    (task,) = read(tmp_path, "livecodebench", [row])
    assert isinstance(task.tests, CallTests)
    assert [(c.args, c.expected) for c in task.tests.cases] == [((1, 2), 3), ((2, 2), 4)]
    assert task.visible == 1
    assert (task.date, task.difficulty) == ("2024-05-01", "easy")


def test_livecodebench_functions_stand_alone_or_in_the_class(tmp_path: Path) -> None:
    """A right program was called in the class that it does not have."""
    (task,) = read(tmp_path, "livecodebench", [LCB])
    for program, name in (("class Solution:\n    pass\n", "Solution"), ("def add(a, b): ...\n", None)):
        tests = submission(task, program, Limits()).tests
        assert isinstance(tests, CallTests)
        assert tests.class_name == name


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("called",)


def test_a_pickle_that_calls_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task file could run anything on the machine that read it."""
    row = {**LCB, "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()}
    with pytest.raises(UserError, match=r"line 1: field private_test_cases .*plain data only"):
        read(tmp_path, "livecodebench", [row])
    assert "called" not in capsys.readouterr().out


def test_livecodebench_dates(tmp_path: Path) -> None:
    """Both days of the window belong to it."""
    days = ("2024-04-30", "2024-05-01", "2024-05-31", "2024-06-01")
    rows = [{**LCB, "question_id": day, "contest_date": f"{day}T00:00:00"} for day in days]
    source = Source(str(written(tmp_path, rows)), lcb_start="2024-05-01", lcb_end="2024-05-31")
    tasks = load_tasks("livecodebench", source)
    assert [task.id for task in tasks.tasks] == ["2024-05-01", "2024-05-31"]
    assert tasks.dropped == {"outside the dates": 2}
    assert [task.number for task in tasks.tasks] == [1, 2]
    with pytest.raises(UserError, match="lcb_start = May"):
        read(tmp_path, "livecodebench", rows, lcb_start="May")
    with pytest.raises(UserError, match="no task left"):
        read(tmp_path, "livecodebench", rows, lcb_start="2030-01-01")


def test_codeforces(tmp_path: Path) -> None:
    """Examples are the visible tests, once; what no program alone can be judged on is left out and counted."""
    rows = [
        CODEFORCES,
        {**CODEFORCES, "id": "1/B", "interaction_format": "ask"},
        {**CODEFORCES, "id": "1/C", "input_mode": "file"},
        {**CODEFORCES, "id": "1/D", "official_tests_complete": False},
        {**CODEFORCES, "id": "1/E", "official_tests": []},
        {**CODEFORCES, "id": "1/F", "generated_checker": "import sys\nprint(1)", "rating": None},
    ]
    tasks = load_tasks("codeforces", Source(str(written(tmp_path, rows))))
    assert [task.id for task in tasks.tasks] == ["1/A", "1/F"]
    assert sum(tasks.dropped.values()) == 4
    first, last = tasks.tasks
    assert isinstance(first.tests, StdinTests)
    assert [case.stdin for case in first.tests.cases] == ["1 2\n", "2 2\n"]
    assert (first.visible, first.rating, last.rating) == (1, 800, None)
    assert first.limits is not None
    assert first.limits.cpu_s == 1.0
    assert isinstance(last.tests, StdinTests)
    assert "print(1)" in last.tests.checker


def test_training_layouts(tmp_path: Path) -> None:
    """AceCode's asserts, DeepCoder's four forms of tests, AReaL's inputs and outputs."""
    (ace,) = read(tmp_path, "acecode", [{"id": "a", "question": "Add.", "test_cases": ["assert add(1, 2) == 3"]}])
    assert ace.entry_point == "add"
    deep = [
        {"problem": "p1", "tests": json.dumps([{"type": "stdin_stdout", "input": "1", "output": "2"}])},
        {
            "problem": "p2",
            "tests": json.dumps([{"type": "function_call", "fn_name": "f", "input": [1], "output": [2]}]),
        },
        {"problem": "p3", "tests": json.dumps({"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]})},
        {"problem": "p4", "tests": LCB["private_test_cases"], "metadata": {"func_name": "add"}},
        {"problem": "p5", "tests": json.dumps([{"input": "1", "output": "2"}]), "starter_code": "x"},
    ]
    kinds = [type(task.tests) for task in read(tmp_path, "deepcoder", deep)]
    assert kinds == [StdinTests, CallTests, CallTests, CallTests, StdinTests]
    content = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    (areal,) = read(tmp_path, "areal", [{"query_id": "r", "prompt": "p", "input_output": content}])
    assert isinstance(areal.tests, StdinTests)
    own = read(tmp_path, "tasks", [OWN, {"id": "two", "prompt": "p", "stdin": [{"input": "1", "output": "2"}]}])
    assert [type(task.tests) for task in own] == [AssertTests, StdinTests]


def test_visible_and_hidden_tests_are_all_tests(tmp_path: Path) -> None:
    """A test counted twice, or never."""
    row = {**OWN, "tests": [f"assert add({n}, 0) == {n}" for n in range(5)], "visible": 2}
    (task,) = read(tmp_path, "tasks", [row])
    parts = [visible_tests(task), hidden_tests(task)]
    assert all(isinstance(part, AssertTests) for part in parts)
    assert sum((part.tests for part in parts), ()) == task.tests.tests  # type: ignore[union-attr]
    assert cut_tests(task.tests, 0, None) == task.tests


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("humaneval", {**HUMANEVAL, "entry_point": "g"}, "entry_point is 'g', but the prompt has no function"),
        ("humaneval", {k: v for k, v in HUMANEVAL.items() if k != "test"}, "field test is missing"),
        ("humaneval", {**HUMANEVAL, "prompt": None}, "field prompt is null"),
        ("humaneval", {**HUMANEVAL, "test": "assert True"}, "defines no function check"),
        ("mbpp", {**MBPP, "test_list": ["assert other(1) == 1"]}, "calls no function that field code defines"),
        ("mbpp", {**MBPP, "test_list": []}, "field test_list"),
        ("mbpp", {**MBPP, "task_id": "11"}, "field task_id holds '11', it must hold a number"),
        ("livecodebench", {**LCB, "public_test_cases": "[{"}, "field public_test_cases is not JSON"),
        ("livecodebench", {**LCB, "public_test_cases": '[{"input": "1"}]'}, "lacks its input or its output"),
        ("livecodebench", {**LCB, "contest_date": "soon"}, "no date"),
        ("livecodebench", {**LCB, "metadata": "{}"}, "metadata has no func_name"),
        ("codeforces", {**CODEFORCES, "description": ""}, "field description holds '', it must hold text"),
        ("acecode", {"id": "a", "question": "q", "test_cases": "assert f()"}, "it must hold a list"),
        ("deepcoder", {"problem": "p", "tests": "[]"}, "or none"),
        ("deepcoder", {"problem": "p", "tests": '{"inputs": ["1"], "outputs": []}'}, "equally long"),
        ("areal", {"prompt": "p", "input_output": "[]"}, "not an object"),
        ("tasks", {**OWN, "entry_point": "plus"}, "entry_point is 'plus', but no test calls it"),
        ("tasks", {**OWN, "solution": "def plus(): ..."}, "but solution does not define it"),
        ("tasks", {"id": "x", "prompt": "p"}, "field stdin is missing"),
        ("tasks", {**OWN, "visible": 9}, "visible is 9"),
    ],
)
def test_malformed_rows_are_refused_with_place_and_field(
    tmp_path: Path, layout: str, row: dict[str, Any], message: str
) -> None:
    """A bad row became a task that no program can pass, hours before anyone noticed."""
    with pytest.raises(UserError, match="line 1") as caught:
        read(tmp_path, layout, [row])
    assert message in str(caught.value)


def test_doubled_ids_are_refused_with_both_places(tmp_path: Path) -> None:
    """Two tasks with one id shared their answers."""
    with pytest.raises(UserError, match=r"line 2: task id 'one' was at .*line 1"):
        read(tmp_path, "tasks", [OWN, OWN])


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    """A file cut off by a broken download."""
    path = written(tmp_path, [OWN])
    path.write_text(path.read_text() + '{"id": "tw')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        load_tasks("tasks", Source(str(path)))


def test_unknown_layouts_and_missing_files(tmp_path: Path) -> None:
    """The nearest name, and the names that were looked for."""
    with pytest.raises(UserError, match="did you mean 'humaneval'"):
        load_tasks("human_eval", Source(str(tmp_path)))
    with pytest.raises(UserError, match=r"no data for mbpp .*looked for mbpp\.jsonl"):
        load_tasks("mbpp", Source(str(tmp_path)))
    with pytest.raises(UserError, match="there is no such file or folder"):
        load_tasks("mbpp", Source(str(tmp_path / "none")))


def test_all_kinds_of_files_give_the_same_tasks(tmp_path: Path) -> None:
    """Parquet holds numpy and missing values where JSON has lists and none."""
    rows = [OWN, {**OWN, "id": "two"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [load_tasks("tasks", Source(str(p))) for p in sorted(tmp_path.iterdir())]
    assert all(tasks.tasks == found[0].tasks for tasks in found)
    assert found[0].fingerprint == found[1].fingerprint


def test_files_are_found_one_folder_down(tmp_path: Path) -> None:
    """A folder of data sets has a folder for each."""
    (tmp_path / "mbpp").mkdir()
    path = written(tmp_path / "mbpp", [MBPP], "mbpp.jsonl")
    assert find_files("mbpp", tmp_path) == [path]


def test_offline_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network the error was a traceback of the hub's client."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"could not be had from the hub .*evaluation.data_dir"):
        load_tasks("humaneval", Source())
