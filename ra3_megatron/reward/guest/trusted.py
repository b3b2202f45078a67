"""Code of the data set, run in a jailed process of its own: asserts against a stand-in, oracles, checkers.

It holds the expected values and no way to the program but the channel; what it finds goes to the referee as lines of
JSON on a pipe: `{"start": i}` and `{"end": i, "outcome": ..., "message": ...}`.
"""

import ast
import builtins
import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from . import compare
from .channel import Channel
from .session import Session, Stop, shown, stand_in

HELPFUL = frozenset(
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools json "  # noqa: SIM905
    "math numbers numpy operator random re statistics string sys time typing".split()
)
"""Modules whose names the tests may take from the program's imports."""
_ALIASES = {"np": "numpy"}
_TEXT = 300


class _Names:
    """Names that the tests use and nobody on this side defines: the program's imports, then its globals.

    Only such names are taken over, so a program cannot redefine a builtin or a helper of the tests by importing.
    """

    def __init__(self, program: str, session: Session, namespace: dict[str, Any]) -> None:
        self._program = program
        self._session = session
        self._namespace = namespace
        self._imports: dict[str, tuple[str, str | None]] | None = None

    def run(self, code: Any) -> None:
        """Run code of the tests; a name that is not there is looked for, and the code run again."""
        tried: set[str] = set()
        while True:
            try:
                exec(code, self._namespace)
                return
            except NameError as error:
                name = error.name
                theirs = hasattr(error, "raised_by_program")
                if theirs or not name or name in tried or name in self._namespace or hasattr(builtins, name):
                    raise
                tried.add(name)
                self._namespace[name] = self._find(name)

    def _find(self, name: str) -> Any:
        if self._imports is None:
            self._imports = _imports_of(self._program)
        module, attribute = self._imports.get(name, (None, None))
        if module is None:
            for starred in (m for key, (m, a) in self._imports.items() if a == "*" and key.startswith("*")):
                if attribute is None and name in _public(starred):
                    return getattr(__import__(starred, fromlist=["*"]), name)
            return self._session.get(name)
        loaded = __import__(module, fromlist=["*"])
        return loaded if attribute is None else getattr(loaded, attribute)


def _public(module: str) -> list[str]:
    loaded = __import__(module, fromlist=["*"])
    return list(getattr(loaded, "__all__", None) or (n for n in vars(loaded) if not n.startswith("_")))


def _imports_of(program: str) -> dict[str, tuple[str, str | None]]:
    """Names bound by the program's imports of `HELPFUL` modules under their own names: module and attribute."""
    found: dict[str, tuple[str, str | None]] = {}
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name
                if alias.name in HELPFUL and alias.name in (name, _ALIASES.get(name)):
                    found[name] = (alias.name, None)
        elif isinstance(node, ast.ImportFrom) and node.module in HELPFUL and not node.level:
            for alias in node.names:
                if alias.name == "*":
                    found[f"*{node.module}"] = (node.module, "*")
                elif alias.asname in (None, alias.name):
                    found[alias.name] = (node.module, alias.name)
    return found


class _Report:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def line(self, **content: Any) -> None:
        os.write(self._fd, json.dumps(content).encode() + b"\n")

    def test(self, index: int, run: Callable[[], str], session: Session) -> Stop | None:
        """Run one test and report it; the reason if there can be no further one. `run` returns what is wrong."""
        self.line(start=index)
        outcome, message = "passed", ""
        try:
            if message := run():
                outcome = "wrong"
        except Stop:
            pass
        except BaseException as error:  # noqa: BLE001 - a test that raises has not passed
            outcome, message = explain(error, session)
        if session.stop is not None:
            outcome, message = session.stop.outcome, session.stop.message
        self.line(end=index, outcome=outcome, message=message, last=session.stop is not None)
        return session.stop


def explain(error: BaseException, session: Session) -> tuple[str, str]:
    """Outcome and message of a test that raised `error`: the program's exception, or one of the tests' own."""
    text = getattr(error, "raised_by_program", None)
    if text is not None:
        return "exception", text
    if isinstance(error, AssertionError):
        said = error.args[0] if error.args else ""
        text = said if isinstance(said, str) else shown(said)
        return "wrong", text[:_TEXT] or f"the last answer was {session.describe_last()}"
    return "wrong", f"the test raised {type(error).__name__}: {error}"[:_TEXT]


def assert_tests(channel_fd: int, report_fd: int, job: dict[str, Any], first: int) -> None:
    """Run the data set's statements from number `first` on."""
    session = Session(Channel(channel_fd, job["limit"]), job["limit"])
    report = _Report(report_fd)
    if not _loaded(session, report, first, job["entry_point"]):
        return
    namespace: dict[str, Any] = {"__name__": "tests"}
    names = _Names(job["program"], session, namespace)

    def prepare() -> None:
        if job["setup"]:
            names.run(compile(job["setup"], "setup", "exec"))
        namespace[job["entry_point"]] = namespace["candidate"] = stand_in(session, job["entry_point"])

    problem: BaseException | None = None
    try:
        prepare()
    except Stop:
        pass
    except BaseException as error:  # noqa: BLE001 - reported with the first test
        problem = error
    for index in range(first, len(job["tests"])):

        def run(index: int = index) -> str:
            if session.stop is not None:
                raise session.stop
            if problem is not None:
                return f"the setup of the tests raised {type(problem).__name__}: {problem}"[:_TEXT]
            names.run(compile(job["tests"][index], "tests", "exec"))
            return ""

        stop = report.test(index, run, session)
        if stop is not None:
            return


def _loaded(session: Session, report: _Report, first: int, name: str) -> bool:
    """Whether the program was loaded and defines `name`; if not, no test can pass."""
    try:
        session.load(name)
    except Stop as stop:
        report.line(end=first, outcome=stop.outcome, message=stop.message, loading=True)
        return False
    return True


def oracle_tests(channel_fd: int, report_fd: int, job: dict[str, Any], first: int) -> None:
    """Call the program from case `first` on and let the data set's oracle judge the answers."""
    session = Session(Channel(channel_fd, job["limit"]), job["limit"])
    report = _Report(report_fd)
    if not _loaded(session, report, first, job["class_name"] or job["entry_point"]):
        return
    namespace: dict[str, Any] = {"__name__": "oracle"}
    exec(compile(job["oracle"], "oracle", "exec"), namespace)
    for index in range(first, len(job["cases"])):
        args, expected = job["cases"][index]

        def run(args: tuple[Any, ...] = args, expected: Any = expected) -> str:
            answer = session.call(*target(job), args, {}, False)
            if namespace["accept"](args, answer, expected):
                return ""
            return f"the oracle does not accept {session.describe_last()}"

        stop = report.test(index, run, session)
        if stop is not None:
            return


def target(job: dict[str, Any]) -> tuple[str, Any]:
    """Kind and name of what a call calls."""
    if job["class_name"]:
        return "method", (job["class_name"], job["entry_point"])
    return "function", job["entry_point"]


def plain_cases(session: Session, job: dict[str, Any]) -> Callable[[int], tuple[str, str]]:
    """A function that calls the program with case `i`, compares, and gives outcome and message."""
    rules: dict[str, Callable[[Any, Any], bool]] = {"equal": compare.equal, "json": compare.as_json}
    right = rules.get(job["compare"]) or partial(compare.close, atol=job["atol"])

    def test(index: int) -> tuple[str, str]:
        args, expected = job["cases"][index]
        try:
            answer = session.call(*target(job), args, {}, False)
        except Exception as error:
            text = getattr(error, "raised_by_program", None)
            if text is None:
                raise
            return "exception", text
        if right(answer, expected):
            return "passed", ""
        return "wrong", f"case {index + 1}: answered {session.describe_last()}"

    return test


def checker(output_fd: int, source: str, texts: tuple[str, str, str]) -> NoReturn:
    """Run a checker program over three files in the working folder, its output to `output_fd`."""
    names = ("input", "output", "answer")
    for name, content in zip(names, texts, strict=True):
        with open(name, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(content)
    sys.argv[:] = ["checker", *names]
    sys.stdout = io.TextIOWrapper(io.FileIO(output_fd, "w", closefd=False), "utf-8", write_through=True)
    code = 1
    try:
        exec(compile(source, "checker", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code & 0xFF)
    raise AssertionError("unreachable")
