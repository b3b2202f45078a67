"""The untrusted side: loads a program and answers calls, or runs it as a process. Nothing here is believed."""

import atexit
import gc
import io
import mmap
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from .channel import Channel, Closed
from .wire import Decoder, Encoder, TooLarge

CHANNEL_FD, SOURCE_FD = 3, 4
_TEXT = 300
"""Characters of an exception that are passed on."""
_SPARE = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
"""Address space given back to tell of a MemoryError, which takes memory too; never touched, so it costs none."""


def read_all(fd: int) -> bytes:
    """Everything in a file, which is then closed."""
    parts = []
    os.lseek(fd, 0, os.SEEK_SET)
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    os.close(fd)
    return b"".join(parts)


def _open_standard_files() -> None:
    """Fresh sys.stdin, stdout and stderr over descriptors 0 to 2, as a new process has them."""
    given = io.BufferedReader(io.FileIO(0, "r", closefd=False))
    sys.stdin = io.TextIOWrapper(given, "utf-8", "surrogateescape")
    sys.__dict__["__stdin__"] = sys.stdin
    for fd, name, errors in ((1, "stdout", "surrogateescape"), (2, "stderr", "backslashreplace")):
        raw = io.FileIO(fd, "w", closefd=False)
        text = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors, line_buffering=fd == 2)
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _new_module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def start(order: dict[str, Any]) -> NoReturn:
    """Run the program as `order["mode"]` says; the process is jailed and holds descriptors 0 to 4."""
    os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
    sys.argv[:] = ["main.py"]
    gc.enable()
    source = read_all(SOURCE_FD)
    if order["mode"] == "script":
        _open_standard_files()  # the others have nothing to read and nobody who listens
        _run(source, {}, None)
    if order["mode"] == "in_process":
        data, source = source[: order["data"]], source[order["data"] :]
        _run(source, {"RA3_DATA": data}, Channel(CHANNEL_FD, order["limit"]))
    _serve(source, order)


# Runs as a process.


def _run(source: bytes, names: dict[str, Any], report: Channel | None) -> NoReturn:
    """Run to the end as `python main.py` would, threads and exit handlers included, and exit with its code."""
    namespace = _new_module("__main__")
    namespace.update(names)
    code = 0
    try:
        exec(compile(source, "main.py", "exec", dont_inherit=True), namespace)
        if report is not None:
            report.send(Encoder(1 << 16).frame(("end",)))
    except SystemExit as error:
        code = _exit_code(error)
        if report is not None:
            report.send(Encoder(1 << 16).frame(("raised", "SystemExit", str(code))))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the program's end
        code = 1
        if isinstance(error, MemoryError):
            _SPARE.close()
        if report is not None:
            report.send(Encoder(1 << 16).frame(("raised", *_describe(error))))
        sys.excepthook(type(error), error, _own_frames(error))
    finally:
        code = _finish(code)
        os._exit(code)
    raise AssertionError("unreachable")


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _own_frames(error: BaseException) -> types.TracebackType | None:
    """The traceback without the frame of this module."""
    return error.__traceback__.tb_next if error.__traceback__ else None


def _finish(code: int) -> int:
    """What an interpreter does at its end: wait for threads, run exit handlers, flush."""
    if threading := sys.modules.get("threading"):
        threading._shutdown()
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except (OSError, ValueError):
            code = code or 120  # as Python's own
    return code


# Answers calls.


class _Objects:
    """Objects that stay on this side; the other side knows their numbers."""

    def __init__(self) -> None:
        self._by_number: list[Any] = []
        self._number_of: dict[int, int] = {}

    def number(self, value: Any) -> int:
        number = self._number_of.get(id(value))
        if number is None:
            number = self._number_of[id(value)] = len(self._by_number)
            self._by_number.append(value)  # kept alive, so its id stays its own
        return number

    def get(self, number: int) -> Any:
        return self._by_number[number]


def _describe(error: BaseException) -> tuple[str, str]:
    """Name of the nearest builtin exception, and the text."""
    for kind in type(error).__mro__:
        if kind.__module__ == "builtins":
            break
    name = kind.__name__ if kind.__name__ != "object" else "Exception"
    try:
        last = traceback.extract_tb(error.__traceback__)
        line = next((f"line {f.lineno}: " for f in reversed(last) if f.filename == "main.py"), "")
        text = f"{line}{type(error).__name__}: {error}"[:_TEXT]
    except BaseException:  # noqa: BLE001 - its __str__ is the program's
        text = name
    return name, text


def _serve(source: bytes, order: dict[str, Any]) -> NoReturn:
    channel = Channel(CHANNEL_FD, 1 << 31)
    namespace = _new_module("solution")
    objects = _Objects()
    limit = order["limit"]
    size = 0  # of the request, whose arguments come back

    def reply(*content: Any) -> None:
        try:
            frame = Encoder(limit + size, objects.number).frame(content)
        except TooLarge as error:
            frame = Encoder(1 << 16).frame((content[0], "large", str(error)))
        channel.send(frame)

    def attempt(number: int, work: Callable[[], tuple[Any, ...]]) -> bool:
        try:
            reply(number, *work())
            return True
        except Closed:
            raise
        except BaseException as error:  # noqa: BLE001 - an exception is an answer
            if isinstance(error, MemoryError):
                _SPARE.close()
            reply(number, "raise", *_describe(error))
            return False

    def load() -> tuple[Any, ...]:
        exec(compile(source, "main.py", "exec", dont_inherit=True), namespace)
        return "ok", None, None

    try:
        if attempt(0, load):
            while True:
                content = channel.receive()
                size = len(content)
                request = Decoder(content, objects.get).value()
                number = request[0]
                attempt(number, lambda: _answer(namespace, *request[1:]))  # noqa: B023 - called at once
    except Closed:
        pass
    finally:
        os._exit(0)
    raise AssertionError("unreachable")


def _answer(
    namespace: dict[str, Any], what: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mirror: bool
) -> tuple[Any, ...]:
    if what == "get":
        if target not in namespace:
            return "missing", str(target)
        value = namespace[target]
        return ("callable", target) if callable(value) else ("ok", value, None)
    if what == "method":
        owner, name = target
        if owner not in namespace:
            return "missing", owner
        function = getattr(namespace[owner](), name, None)
    else:
        function = namespace.get(target)
        name = target
    if function is None:
        return "missing", name
    # Iterators are written before the arguments are: they may still change them.
    return "ok", function(*args, **kwargs), (args, kwargs) if mirror else None
