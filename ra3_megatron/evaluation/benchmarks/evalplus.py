"""HumanEval+ and MBPP+ of EvalPlus (Liu et al. 2023, arXiv 2305.01210): many inputs, compared with a reference.

The files hold inputs; the expected outputs are what the reference solution gives for them (see `expected`). Semantics
are those of EvalPlus 26d6d00: its list of inputs that JSON could not hold, its special oracles, its tolerances.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.benchmarks import humaneval
from ra3_megatron.evaluation.benchmarks.expected import Answered, Asked
from ra3_megatron.evaluation.benchmarks.functions import defined_names
from ra3_megatron.evaluation.benchmarks.plain import dumps
from ra3_megatron.evaluation.benchmarks.rows import Hub, Row
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.reward.problem import AssertTests, CallCase, CallTests, Limits

HUMANEVAL_FILES = (
    "HumanEvalPlus.jsonl.gz",
    "HumanEvalPlus.jsonl",
    "HumanEvalPlus-v*.jsonl*",
    "humanevalplus/test-*.parquet",
)
MBPP_FILES = ("MbppPlus.jsonl.gz", "MbppPlus.jsonl", "MbppPlus-v*.jsonl*", "mbppplus/test-*.parquet")
HUMANEVAL_HUB = Hub("evalplus/humanevalplus")
MBPP_HUB = Hub("evalplus/mbppplus")

NOT_NONE = frozenset({"check_str", "text_match_three", "text_starta_endb"})
"""MBPP+ functions of which only "something" or None is expected (a match object, or truth)."""
AS_SETS = frozenset(
    {
        "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly",
        "larg_nnum", "intersection_array", "find_dissimilar", "Diff",
    }
)  # fmt: skip
"""MBPP+ functions whose answers are compared as sets."""

_SLOWER = 4.0
"""A program may take so many times the reference's processor time, as in EvalPlus."""

_ROOM_BYTES, _LARGER = 1 << 20, 8
"""An answer may be so many bytes, and so many times the reference's largest: some are longer than a megabyte."""
_WRITING_S = 4e-7
"""Processor seconds more for each byte of the largest answer, which the program has to send."""

Compute = Callable[[Sequence[Asked]], list[Answered]]
"""Runs references on inputs: one answer for each question, in order."""

# ----------------------------------------------------------------------------------------------------------- inputs

_EACH_ARGUMENT = frozenset(
    {2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809}
)
_ITEMS_OF_EACH = frozenset({63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780})
_ITEMS_OF_FIRST = frozenset({75, 413, 444, 753})
_SECOND = frozenset({106, 750})
_FIRST = frozenset({250, 405, 446, 617, 720, 763, 808})
_BOTH_LEVELS = frozenset({259, 401, 445})
_ALL_LEVELS = frozenset({580, 615, 791})


def restored_arguments(number: int, arguments: list) -> list:
    """Arguments of one call of MBPP+ task `number` as the reference expects them: tuples, sets, complex numbers."""
    a = arguments
    if number in _EACH_ARGUMENT:
        return [tuple(x) for x in a]
    if number in _ITEMS_OF_EACH:
        return [[tuple(y) for y in x] for x in a]
    if number in _ITEMS_OF_FIRST:
        return [[tuple(y) for y in a[0]], a[1]]
    if number in _SECOND:
        return [a[0], tuple(a[1])]
    if number in _FIRST:
        return [tuple(a[0]), a[1]]
    if number in _BOTH_LEVELS:
        return [tuple(tuple(y) for y in x) for x in a]
    if number in _ALL_LEVELS:
        return [_all_tuples(x) for x in a]
    if number == 115:
        # An empty one becomes a dict in EvalPlus, not a set.
        return [[set(x) if isinstance(x, list) and x else {} for x in a[0]]]
    if number == 124:
        return [float(a[0]), complex(a[1])]
    if number == 252:
        return [complex(a[0])]
    if number == 278:
        return [tuple(tuple(x) if isinstance(x, list) else x for x in a[0])]
    if number == 307:
        return [tuple(a[0]), a[1], a[2]]
    if number == 722:
        return [{key: tuple(x) for key, x in a[0].items()}, *a[1:]]
    return a


def _all_tuples(value: Any) -> Any:
    return tuple(_all_tuples(x) for x in value) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------- oracles

_FIND_ZERO = '''
def accept(args, answer, expected):
    """HumanEval/32: any zero of the polynomial."""
    coefficients, = args
    return abs(sum(c * pow(float(answer), i) for i, c in enumerate(coefficients))) <= {atol!r}
'''
_ANYTHING = '''
def accept(args, answer, expected):
    """Mbpp/164: the reference itself is doubtful, every answer counts."""
    return True
'''
_OR_ZERO = '''
def accept(args, answer, expected):
    """Mbpp/295: 0 counts as well."""
    return answer == expected or answer == 0
'''
_PYRAMID = '''
def accept(args, answer, expected):
    """Mbpp/581: height may be understood as the perpendicular one."""
    edge, height = args
    slant = ((edge / 2) ** 2 + height**2) ** 0.5
    return answer == expected or abs(answer - round(edge**2 + 4 * (edge * slant) / 2)) <= {atol!r}
'''
_DIGITS = '''
def accept(args, answer, expected):
    """Mbpp/558: numbers of different length may be padded with zeros."""
    first, second = (str(number) for number in args)
    width = max(len(first), len(second))
    pairs = zip(first.zfill(width), second.zfill(width))
    return answer == expected or answer == sum(abs(int(a) - int(b)) for a, b in pairs)
'''
_SETS = '''
def accept(args, answer, expected):
    """Order and repetitions do not count."""
    return set(answer) == set(expected)
'''
_SOMETHING = '''
def accept(args, answer, expected):
    """Something or None; a truth value must be the right one."""
    return answer == expected if isinstance(answer, bool) else expected == (answer is not None)
'''
_OWN = {
    "are_equivalent": _ANYTHING,
    "sum_div": _OR_ZERO,
    "surface_Area": _PYRAMID,
    "digit_distance_nums": _DIGITS,
}


def oracle_of(benchmark: str, entry_point: str, atol: float) -> str:
    """Source of the special oracle of a function; empty where outputs are compared."""
    if benchmark == "humaneval+":
        return _FIND_ZERO.format(atol=atol) if entry_point == "find_zero" else ""
    if entry_point in AS_SETS:
        return _SETS
    if entry_point in NOT_NONE:
        return _SOMETHING
    return _OWN.get(entry_point, "").format(atol=atol)


# ------------------------------------------------------------------------------------------------------------ tasks


def read(rows: Sequence[Row], name: str, compute: Compute, cpu_s: float) -> list[Task]:
    """Tasks of `humaneval+` or `mbpp+`; `compute` runs the references, `cpu_s` is the least limit of a call.

    Rows without inputs, as on the hub, hold their tests as a program and are taken as they are.
    """
    drafts = [_draft(number, row, name) for number, row in enumerate(rows)]
    with_inputs = [d for d in drafts if d is not None]
    if not with_inputs:
        return humaneval.read(rows, name) if name == "humaneval+" else [_as_program(n, r) for n, r in enumerate(rows)]
    if len(with_inputs) < len(rows):
        raise UserError(f"{rows[0].place}: some rows have base_input and others not; the file mixes two layouts")
    computed = compute(
        [Asked(d.id, d.reference, d.entry_point, d.inputs, d.entry_point in NOT_NONE) for d in with_inputs]
    )
    return [_task(d, a.outputs, a.seconds, cpu_s) for d, a in zip(with_inputs, computed, strict=True)]


class _Draft:
    """A row's fields, checked, before its outputs are known."""

    def __init__(self, number: int, row: Row, name: str) -> None:
        self.number, self.name, self.id = number, name, row.text("task_id")
        self.prompt, self.entry_point = row.text("prompt"), row.text("entry_point")
        self.reference = self.prompt + row.text("canonical_solution")
        self.atol = float(row.number("atol", 0.0) or 0.0)
        # One task of MBPP+ v0.2.0 has `{}` where it means no further inputs.
        base, plus = row.items("base_input"), row.items("plus_input", []) if row.values.get("plus_input") else []
        digits = self.id.rsplit("/", 1)[-1]
        if not digits.isdigit():
            raise row.refuse(f"task_id {self.id!r} does not end in a number, by which inputs are told apart")
        if self.entry_point not in defined_names(self.reference):
            raise row.refuse(f"entry_point is {self.entry_point!r}, but prompt and canonical_solution do not define it")
        if not base or not all(isinstance(arguments, list) for arguments in [*base, *plus]):
            raise row.refuse("base_input and plus_input must be lists of argument lists, the first not empty")
        try:
            self.inputs = [*base, *plus]
            if name == "mbpp+":
                self.inputs = [restored_arguments(int(digits), arguments) for arguments in self.inputs]
        except (TypeError, IndexError, ValueError, AttributeError) as error:
            raise row.refuse(f"the inputs are not those of MBPP+ v0.2.0 ({error})") from None
        self.base = len(base)


def _draft(number: int, row: Row, name: str) -> _Draft | None:
    return _Draft(number, row, name) if row.values.get("base_input") is not None else None


def _task(draft: _Draft, outputs: list, seconds: list[float], cpu_s: float) -> Task:
    oracle = oracle_of(draft.name, draft.entry_point, draft.atol)
    cases = tuple(CallCase(tuple(a), e) for a, e in zip(draft.inputs, outputs, strict=True))
    fit = _fit(cases, oracle)
    largest = max(len(dumps(case.expected)) for case in cases)
    return Task(
        id=draft.id,
        benchmark=draft.name,
        number=draft.number,
        prompt=draft.prompt,
        form="code" if draft.name == "humaneval+" else "docstring",
        tests=CallTests(
            draft.entry_point,
            tuple(case for case, fine in zip(cases, fit, strict=True) if fine),
            compare="close",
            atol=draft.atol,
            oracle=oracle,
        ),
        visible=sum(fit[: draft.base]),
        entry_point=draft.entry_point,
        reference=draft.reference,
        limits=Limits(
            max(cpu_s, _SLOWER * max(seconds)) + _WRITING_S * largest,
            output_bytes=_ROOM_BYTES + _LARGER * largest,
        ),
        facts={"seconds": seconds, "cases": cases, "base": draft.base},
    )


def _fit(cases: Sequence[CallCase], oracle: str) -> list[bool]:
    """Which calls the reference itself answers as the oracle demands.

    HumanEval/32 is solved by Newton's method, which on CPython 3.12 and newer, whose `sum` of floats rounds otherwise,
    does not arrive for 7 of its 888 inputs; nobody can be asked what the reference cannot answer.
    """
    if not oracle:
        return [True] * len(cases)
    space: dict[str, Any] = {}
    exec(oracle, space)
    return [bool(space["accept"](case.args, case.expected, case.expected)) for case in cases]


def _as_program(number: int, row: Row) -> Task:
    """A task of MBPP+ in the hub's layout: the tests are a program that calls the function."""
    asserts, code = row.texts("test_list"), row.text("code")
    called = [name for name in defined_names(code) if any(f"{name}(" in line for line in asserts)]
    if not called:
        raise row.refuse("test_list calls no function that field code defines")
    prompt = f'"""\n{row.text("prompt").strip()}\n{asserts[0]}\n"""\n'
    task_id = int(row.number("task_id") or 0)
    return Task(
        id=f"Mbpp/{task_id}",
        benchmark="mbpp+",
        number=number,
        prompt=prompt,
        form="docstring",
        tests=AssertTests(called[-1], (row.text("test"),)),
        entry_point=called[-1],
        examples=(asserts[0],),
        reference=code,
    )
