"""Python's expressions and statements as closures over plain data: those that compare answers with literals.

Nothing is evaluated by Python's `eval`: a closed set of nodes, without attributes, powers, repetition or formatting.
What is not known for certain to mean the same here is `Unknown`.
"""

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

from . import plain
from .plain import Clock
from .session import Session, holds_mutable

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_IDENTITY: dict[type, Callable[[Any, Any], Any]] = {ast.Is: operator.is_, ast.IsNot: operator.is_not}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}
_NUMBER = 1 << 64
_DIGITS = 100


class Unknown(Exception):
    """Something in the tests that is not taken here."""


class Frame:
    """Variables of one test or one call of `check`, the way to the program, and the clock."""

    def __init__(self, session: Session | None, clock: Clock, names: dict[str, Any]) -> None:
        self.session = session
        self.clock = clock
        self.names = names


_Value = Callable[[Frame], Any]
Body = list[Callable[[Frame], None]]
Requests = list[Callable[[Frame], tuple[Any, ...]]]


class Scope:
    """Reads statements in their order; knows which names are bound, and to what."""

    def __init__(self, program: str, callables: set[str], modules: set[str], taken: set[str]) -> None:
        self._program = program
        self.callables = callables
        self.names: set[str] = set()
        self.modules = modules
        self.requests: Requests = []
        self._calls = 0
        self._sure = True  # whether what is read is carried out whatever the answers are, unless a test fails before
        self._taken = taken | plain.FUNCTIONS.keys() | plain.TYPES.keys()

    def bind(self, name: str) -> None:
        """A name may be bound where that changes nothing but its own later uses."""
        if name in self._taken or name in self.callables:
            raise Unknown(name)

    # Statements

    def statement(self, node: ast.stmt) -> Callable[[Frame], None]:
        """What carries out one statement."""
        match node:
            case ast.Assert():
                return self._assert(node)
            case ast.Expr(value=value):
                run = self.value(value)[0]
                return lambda frame: _drop(run(frame))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                return self.assign(name, value)
            case ast.Import(names=[ast.alias(name="math", asname=None)]) if "math" not in self.modules:
                self.modules.add("math")
                return _drop
            case ast.Pass():
                return _drop
        raise Unknown(type(node).__name__)

    def _assert(self, node: ast.Assert) -> Callable[[Frame], None]:
        (condition, _), *messages = self._in_turn([node.test, *([] if node.msg is None else [node.msg])], sure=1)

        def run(frame: Frame) -> None:
            if not condition(frame):
                raise AssertionError(*[message(frame) for message, _ in messages])

        return run

    def assign(self, name: str, value: ast.expr) -> Callable[[Frame], None]:
        """What gives a variable its value."""
        run = self.value(value)[0]
        self.bind(name)
        self.names.add(name)

        def assign(frame: Frame) -> None:
            frame.names[name] = run(frame)

        return assign

    # Expressions: what gives the value, and whether the program has a part in it.

    def value(self, node: ast.expr) -> tuple[_Value, bool]:
        """What gives the value of an expression; and whether the program may have chosen it."""
        match node:
            case ast.Constant(value=constant):
                return lambda _: constant, False
            case ast.Name(id=name):
                return self._name(name)
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                return self._items(node, items)
            case ast.Dict():
                return self._dict(node)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                apply, (run, theirs) = _UNARY[type(op)], self.value(operand)
                return lambda frame: apply(run(frame)), theirs
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.BoolOp():
                return self._bool(node)
            case ast.Compare():
                return self._compare(node)
            case ast.Subscript(value=whole, slice=ast.Constant() | ast.UnaryOp() as index):
                (of, _), (at, _) = self.value(whole), self.value(index)
                return lambda frame: of(frame)[at(frame)], True
            case ast.Call():
                return self._call(node)
        raise Unknown(type(node).__name__)

    def _name(self, name: str) -> tuple[_Value, bool]:
        if name in self.names:
            return lambda frame: frame.names[name], True  # the program may have changed it since
        if name in plain.TYPES and name not in self.callables:
            kind = plain.TYPES[name]
            return lambda _: kind, False
        raise Unknown(name)

    def _items(self, node: ast.expr, items: Sequence[ast.expr]) -> tuple[_Value, bool]:
        pairs = [self.value(item) for item in items]
        runs = [run for run, _ in pairs]
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return lambda frame: kind([run(frame) for run in runs]), any(theirs for _, theirs in pairs)

    def _dict(self, node: ast.Dict) -> tuple[_Value, bool]:
        if any(key is None for key in node.keys):
            raise Unknown("**")
        pairs = [(self.value(k), self.value(v)) for k, v in zip(node.keys, node.values, strict=True) if k is not None]
        runs = [(key, value) for (key, _), (value, _) in pairs]
        theirs = any(of_key or of_value for (_, of_key), (_, of_value) in pairs)
        return lambda frame: {key(frame): value(frame) for key, value in runs}, theirs

    def _arithmetic(self, node: ast.BinOp) -> tuple[_Value, bool]:
        (left, theirs), (right, theirs_too) = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.Add | ast.Sub):
            apply = operator.add if isinstance(node.op, ast.Add) else operator.sub
        elif isinstance(node.op, ast.Mult | ast.Div) and _number(node.left) and _number(node.right):
            apply = operator.mul if isinstance(node.op, ast.Mult) else operator.truediv
        else:
            raise Unknown("an operator")
        return lambda frame: apply(left(frame), right(frame)), theirs or theirs_too

    def _in_turn(self, nodes: Sequence[ast.expr], sure: int) -> list[tuple[_Value, bool]]:
        """Values of which all after the first `sure` may be left out."""
        found = [self.value(node) for node in nodes[:sure]]
        calls, before, self._sure = self._calls, self._sure, False
        found += [self.value(node) for node in nodes[sure:]]
        self._sure = before and self._calls == calls
        return found

    def _bool(self, node: ast.BoolOp) -> tuple[_Value, bool]:
        pairs = self._in_turn(node.values, sure=1)
        *runs, last = [run for run, _ in pairs]
        ends = isinstance(node.op, ast.Or)

        def run(frame: Frame) -> Any:
            for part in runs:
                value = part(frame)
                if bool(value) is ends:
                    return value
            return last(frame)

        return run, any(theirs for _, theirs in pairs)

    def _compare(self, node: ast.Compare) -> tuple[_Value, bool]:
        parts = self._in_turn((node.left, *node.comparators), sure=2)
        steps = []
        for op, (_, theirs), (right, theirs_too) in zip(node.ops, parts, parts[1:], strict=False):
            if type(op) not in _IDENTITY and theirs and theirs_too:
                raise Unknown("two answers compared")  # sets and dicts of keys that collide take for ever
            steps.append((_comparison(op), right))
        first, last = parts[0][0], len(steps) - 1

        def run(frame: Frame) -> Any:
            left = first(frame)
            result = None
            for index, (apply, operand) in enumerate(steps):
                right = operand(frame)
                result = apply(frame, left, right)
                if index < last and not result:
                    break
                left = right
            return result

        return run, any(theirs for _, theirs in parts)

    # Calls

    def _call(self, node: ast.Call) -> tuple[_Value, bool]:
        arguments = [self.value(argument) for argument in node.args]
        keywords = [(k.arg, self.value(k.value)) for k in node.keywords]
        if any(name is None for name, _ in keywords):
            raise Unknown("**")
        match node.func:
            case ast.Name(id=name) if name in self.callables:
                return self._ask(node, arguments, keywords), True
            case ast.Name(id=name) if name in plain.FUNCTIONS:
                return self._builtin(name, node, arguments, keywords)
            case ast.Attribute(value=ast.Name(id="math"), attr="isclose") if "math" in self.modules:
                return self._builtin("math.isclose", node, arguments, keywords)
        raise Unknown("a call")

    def _ask(self, node: ast.Call, arguments: list[tuple[_Value, bool]], keywords: list[Any]) -> _Value:
        """A call of the program. Only a variable can be looked at afterwards, so only such arguments come back."""
        runs = [run for run, _ in arguments]
        named = [(name, run) for name, (run, _) in keywords]
        values = (*node.args, *(k.value for k in node.keywords))
        mirror = any(isinstance(n, ast.Name) and n.id in self.names for value in values for n in ast.walk(value))

        program = self._program

        def request(frame: Frame) -> tuple[Any, ...]:
            args = tuple([argument(frame) for argument in runs])
            kwargs = {name: argument(frame) for name, argument in named}
            back = mirror and (holds_mutable(args) or any(map(holds_mutable, kwargs.values())))
            return "function", program, args, kwargs, back

        def run(frame: Frame) -> Any:
            assert frame.session is not None
            return frame.session.call(*request(frame))

        self._calls += 1
        # No call can go ahead of one that cannot.
        self._sure = self._sure and not any(theirs for _, theirs in (*arguments, *(pair for _, pair in keywords)))
        if self._sure:
            self.requests.append(request)
        return run

    def _builtin(
        self, name: str, node: ast.Call, pairs: list[tuple[_Value, bool]], keywords: list[Any]
    ) -> tuple[_Value, bool]:
        function, allowed = plain.FUNCTIONS[name]
        if not {key for key, _ in keywords} <= set(allowed) or any(theirs for _, (_, theirs) in keywords):
            raise Unknown(f"keywords of {name}")
        if name == "round" and not all(_small(n) for n in (*node.args[1:], *(k.value for k in node.keywords))):
            raise Unknown("digits")
        if name == "range" and not all(_number(argument) for argument in node.args):
            raise Unknown("a range of an answer")
        runs, named = [run for run, _ in pairs], [(key, run) for key, (run, _) in keywords]

        def run(frame: Frame) -> Any:
            args = [argument(frame) for argument in runs]
            return function(frame.clock, *args, **{key: argument(frame) for key, argument in named})

        return run, any(theirs for _, theirs in pairs)


def _drop(_: Any) -> None:
    return None


def _number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if not isinstance(node, ast.Constant):
        return False
    return type(node.value) is float or (type(node.value) is int and node.value < _NUMBER)


def _small(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= _DIGITS


def _comparison(op: ast.cmpop) -> Callable[[Frame, Any, Any], Any]:
    kind = type(op)
    if kind is ast.In:
        return lambda frame, left, right: plain.contains(frame.clock, right, left)
    if kind is ast.NotIn:
        return lambda frame, left, right: not plain.contains(frame.clock, right, left)
    apply = _COMPARE.get(kind) or _IDENTITY[kind]
    return lambda _, left, right: apply(left, right)
