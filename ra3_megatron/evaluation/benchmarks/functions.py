"""What tests written as Python statements, and reference solutions, say about the function that they are about."""

import ast
import builtins
import warnings
from collections.abc import Sequence

_BUILTIN = frozenset(dir(builtins))


def parsed(source: str) -> ast.Module | None:
    """The syntax tree; None when the text is no Python."""
    try:
        with warnings.catch_warnings():
            # Data sets are full of `"\d"`; a warning for each would hide what matters.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def defined_names(source: str) -> list[str]:
    """Functions and classes that a program defines at its top level, in order; empty when it is no Python."""
    tree = parsed(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds)] if tree else []


def called_names(statements: Sequence[str]) -> list[str]:
    """Plain names called in statements, outermost first, builtins too."""
    found: list[str] = []
    for statement in statements:
        tree = parsed(statement)
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree else []
        found += [name.id for name in calls if isinstance(name, ast.Name)]
    return found


def entry_point_of(tests: Sequence[str], reference: str = "") -> str | None:
    """Function that `tests` call: one that the reference solution defines, else the one that every test calls.

    None when the tests call nothing, or not all the same function. Without a reference it can be no builtin's name.
    """
    called = called_names(tests)
    defined = defined_names(reference)
    if defined:
        return next((name for name in called if name in defined), None)
    everywhere = [name for name in dict.fromkeys(called) if all(name in called_names([test]) for test in tests)]
    return next((name for name in everywhere if name not in _BUILTIN), None)


def import_lines(source: str) -> str:
    """The imports at the top level of a program."""
    tree = parsed(source)
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)] if tree else []
    return "\n".join(lines)


def before_function(prompt: str, name: str) -> str:
    """What stands before the head of function `name`: imports and helpers of a HumanEval prompt."""
    lines = prompt.splitlines(keepends=True)
    heads = [n for n, line in enumerate(lines) if line.startswith((f"def {name}(", f"async def {name}("))]
    return "".join(lines[: heads[-1]]) if heads else ""


def is_python(source: str) -> bool:
    """Whether a text parses."""
    return parsed(source) is not None
