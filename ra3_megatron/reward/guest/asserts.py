"""Asserts that only compare answers with literals, carried out over plain data: no code of the data set runs for them.

`plan` reads the tests once. What it does not know for certain to mean the same here, it does not take, and such tests
run in a process of their own (`trusted.assert_tests`), whose verdicts these are.
"""

import ast
import sys
import typing
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from . import plain
from .expressions import Body, Frame, Requests, Scope, Unknown
from .plain import Clock
from .session import Session
from .supervise import Broken, Ended
from .trusted import HELPFUL, explain

_SOURCE = 1 << 14
"""Longest tests that are read, characters: one plan of each of the last tasks is kept."""


class Plan:
    """Tests that were understood."""

    def __init__(self, setup: Body, tests: list[tuple[Body, Requests]]) -> None:
        self._setup = setup
        self._tests = tests

    def start(self, session: Session, limit_s: float, ahead: bool) -> Callable[[int], tuple[str, str]]:
        """A function that carries out test number `i` and gives outcome and message, for one process of a program.

        `limit_s`: processor seconds of one test here. `ahead`: a test that fails is the last, so that its calls can be
        sent all at once. It raises what `Session.call` and `Clock` raise.
        """
        clock = Clock(limit_s)
        top = Frame(session, clock, {})
        for step in self._setup:
            step(top)

        def test(index: int) -> tuple[str, str]:
            clock.start()
            frame = Frame(session, clock, dict(top.names))
            try:
                steps, requests = self._tests[index]
                if len(requests) > 1 and (ahead or index == len(self._tests) - 1):
                    session.ahead(_contents(frame, requests))
                for step in steps:
                    step(frame)
            except (Ended, Broken):
                raise
            except Exception as error:  # noqa: BLE001 - a test that raises has not passed
                return explain(error, session)
            return "passed", ""

        return test


def _contents(frame: Frame, requests: Requests) -> Iterator[tuple[Any, ...]]:
    """What the requests ask, up to one whose arguments raise: that is the test's own business."""
    for request in requests:
        try:
            yield request(frame)
        except Exception:  # noqa: BLE001
            return


class _Setup:
    """Reads the setup: imports, literals, functions. Only `check` is looked into, and only when it is called."""

    def __init__(self, entry_point: str) -> None:
        self.entry_point = entry_point
        self.steps: Body = []
        self.functions: dict[str, ast.FunctionDef] = {}
        self.objects: dict[str, Any] = {}
        self.scope = Scope(entry_point, {entry_point, "candidate"}, set(), set())

    def read(self, tree: ast.Module) -> None:
        """Take all statements.

        Raises:
            Unknown: one of them does something, or might raise.
        """
        for node in tree.body:
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        self._import(alias.asname or alias.name, self._module(alias.name))
                        if alias.name == "math" and alias.asname is None:
                            self.scope.modules.add("math")
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    for alias in names:
                        self._import(alias.asname or alias.name, _attribute(self._module(module), alias.name))
                case ast.FunctionDef():
                    self._function(node)
                case ast.Expr(value=ast.Constant()):
                    continue
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._literal(name, value)
                case _:
                    raise Unknown(type(node).__name__)

    def _bind(self, name: str) -> None:
        self.scope.bind(name)
        if name in self.functions or name in self.objects or name in self.scope.names:
            raise Unknown(f"{name} is bound twice")

    def _import(self, name: str, value: Any) -> None:
        if self.objects.get(name) is not value:
            self._bind(name)
        self.objects[name] = value

    def _module(self, name: str) -> Any:
        if name not in HELPFUL or name not in sys.modules:
            raise Unknown(name)
        return sys.modules[name]

    def _literal(self, name: str, value: ast.expr) -> None:
        run, theirs = self.scope.value(value)
        if theirs:
            raise Unknown("the setup asks the program")
        self._bind(name)
        try:
            run(Frame(None, Clock(1.0), {}))  # the program has no part in it
        except Exception as error:
            raise Unknown("a literal that raises") from error
        self.steps.append(self.scope.assign(name, value))

    def _function(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        if node.decorator_list or node.type_params:
            raise Unknown("a decorator")
        if not all(isinstance(d, ast.Constant | None) for d in (*arguments.defaults, *arguments.kw_defaults)):
            raise Unknown("a default value")
        for annotation in (node.returns, *(argument.annotation for argument in every if argument is not None)):
            if annotation is not None:
                self._annotation(annotation)
        if node.name != self.entry_point:  # the stand-in takes its place
            self._bind(node.name)
            self.functions[node.name] = node

    def _annotation(self, node: ast.expr) -> Any:
        """The value of an annotation: it is evaluated when the function is defined, and might raise."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in plain.TYPES:
                return plain.TYPES[name]
            case ast.Name(id=name) if name in self.objects and self.objects[name] in vars(typing).values():
                return self.objects[name]
            case ast.Tuple(elts=items):
                return tuple([self._annotation(item) for item in items])
            case ast.List(elts=items):
                return [self._annotation(item) for item in items]
            case ast.Subscript(value=value, slice=index):
                try:
                    return self._annotation(value)[self._annotation(index)]
                except TypeError as error:
                    raise Unknown("an annotation that raises") from error
        raise Unknown("an annotation")

    # Tests

    def test(self, source: str) -> tuple[Body, Requests]:
        """What carries out one test, and the calls that it begins with."""
        scope = self._inner({self.entry_point, "candidate"})
        body: Body = []
        requests: Requests | None = None
        for node in ast.parse(source).body:
            match node:
                case ast.Expr(ast.Call(ast.Name(id=name), [ast.Name(id=given)], [])) if name in self.functions:
                    if given not in scope.callables:
                        raise Unknown("check of something else")
                    step, requests = self._check(self.functions[name])
                    body.append(step)
                case _:
                    body.append(scope.statement(node))
        return body, scope.requests if requests is None else requests if len(body) == 1 else []

    def _inner(self, callables: set[str]) -> Scope:
        taken = {*self.functions, *self.objects, *self.scope.names}
        scope = Scope(self.entry_point, callables, set(self.scope.modules), taken)
        scope.names |= self.scope.names
        return scope

    def _check(self, node: ast.FunctionDef) -> tuple[Callable[[Frame], None], Requests]:
        """A call of `check`: its parameter is the program's function, its variables are its own."""
        given = node.args
        if len(given.args) != 1 or given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg:
            raise Unknown("arguments of check")
        parameter = given.args[0].arg
        if parameter != "candidate":
            self._bind(parameter)
        scope = self._inner({self.entry_point, "candidate", parameter})
        body = [scope.statement(statement) for statement in node.body]

        def run(frame: Frame) -> None:
            inner = Frame(frame.session, frame.clock, dict(frame.names))
            for step in body:
                step(inner)

        return run, scope.requests


def _attribute(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise Unknown(name)
    return getattr(module, name)


@lru_cache(maxsize=32)
def _read(entry_point: str, setup: str, tests: tuple[str, ...]) -> Plan | None:
    if len(setup) + sum(map(len, tests)) > _SOURCE or entry_point in plain.FUNCTIONS or entry_point in plain.TYPES:
        return None
    try:
        reader = _Setup(entry_point)
        reader.read(ast.parse(setup))
        return Plan(reader.steps, [reader.test(test) for test in tests])
    except (Unknown, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def plan(job: dict[str, Any]) -> Plan | None:
    """The tests of an assert job as they are carried out here; none where they need a process of their own."""
    return _read(job["entry_point"], job["setup"], tuple(job["tests"]))
