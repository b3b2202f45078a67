"""The trusted side's view of a program that answers calls: a stand-in per function, plain data in and out."""

import builtins
import reprlib
from collections.abc import Iterable
from typing import Any

from . import compare
from .channel import Channel, Closed, Oversized
from .wire import Decoder, Encoder, Listed, TooLarge, Unsendable, WireError

_REQUEST_LIMIT = 1 << 30
_AHEAD_BYTES = 1 << 14
"""Most bytes of requests that are sent ahead: any socket takes them while the other side does not read."""
_short = reprlib.Repr()
_short.maxother = _short.maxstring = _short.maxlong = 60


def shown(value: Any) -> str:
    """A value of the program in short; an integer of more digits than Python prints has no text."""
    try:
        return _short.repr(value)
    except Exception as error:  # noqa: BLE001 - whatever it is, the value is still an answer
        return f"{type(value).__name__} without a text: {error}"


class Stop(BaseException):
    """Ends the tests whatever they catch: the verdict is known. `outcome` empty: ask how the process ended."""

    def __init__(self, outcome: str, message: str = "") -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message


class Opaque:
    """An object that stays with the program: true, equal to itself only."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __repr__(self) -> str:
        return f"<object {self._number} of the program>"


class Session:
    """Calls to one program over a channel.

    `stop` is set once the program has ended, broken the protocol or made an answer too large: nothing that the tests
    do afterwards can pass.
    """

    def __init__(self, channel: Channel, limit: int) -> None:
        self._channel = channel
        self._limit = limit
        self._number = 0
        self._objects: dict[int, Opaque] = {}
        self._ahead: list[tuple[int, int]] = []
        self.stop: Stop | None = None
        self.last: Any = None

    def load(self, name: str) -> None:
        """Wait until the program is loaded, and make sure that it defines `name`.

        Raises:
            Stop: it raised, or ended, or does not.
        """
        self.ahead([("get", name, (), {}, False)])
        kind, *rest = self._receive(0)
        if kind == "raise":
            name, text = self._texts(rest)
            kinds = {"MemoryError": "memory", "SystemExit": "crashed", "KeyboardInterrupt": "crashed"}
            self._fail(kinds.get(name, "exception"), text)
        if kind != "ok":
            self._fail("crashed", "broke the protocol while loading")
        if self._request("get", name, (), {}, False)[0] == "missing":
            self._fail("missing", f"the program does not define {name!r}")

    def ahead(self, requests: Iterable[tuple[Any, ...]]) -> None:
        """Send the next requests before they are made: neither side then waits for the other at each of them.

        Those that follow must be these, in this order; what cannot be sent ahead, and all after it, is left to them.
        """
        frames, number = b"", self._number
        for content in requests:
            number += 1
            try:
                frame = Encoder(_AHEAD_BYTES).frame((number, *content))
            except (TooLarge, Unsendable):
                break
            if len(frames) + len(frame) > _AHEAD_BYTES:
                break
            frames += frame
            self._ahead.append((number, len(frame)))
        if frames and self.stop is None:
            try:
                self._channel.send(frames)
            except Closed:
                self._ahead.clear()  # it has ended, and what it wrote before is still to be read

    def call(self, what: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mirror: bool) -> Any:
        """The answer to one call, an exception included; changed arguments are changed here too if `mirror`.

        Raises:
            Stop: there will be no answer.
            Exception: the builtin exception that the program raised; its `raised_by_program` is the text.
        """
        kind, *rest = self._request(what, target, args, kwargs, mirror)
        if kind == "raise":
            self._raise(*self._texts(rest))
        if kind == "missing":
            self._fail("missing", f"the program does not define {shown(rest[0] if rest else '')}")
        if kind != "ok" or len(rest) != 2:
            self._fail("crashed", "broke the protocol")
        self.last, mirrored = rest
        if mirror:
            self._mirror((args, kwargs), mirrored)
        return self.last

    def get(self, name: str) -> Any:
        """The program's global `name`: plain data, or a stand-in for a function or class; `Stop` if it has none."""
        kind, *rest = self._request("get", name, (), {}, False)
        if kind == "callable":
            return stand_in(self, name)
        if kind != "ok" or len(rest) != 2:
            self._fail("missing", f"the program does not define {name!r}, which the tests use")
        return rest[0]

    def report(self) -> tuple[str, str]:
        """Outcome and message of a program that runs its own tests (`program._run`)."""
        try:
            content = Decoder(self._channel.receive()).value()
        except Closed:
            self._fail("")
        except (Oversized, WireError) as error:
            self._fail("crashed", f"broke the protocol: {error}")
        if content == ("end",):
            return "passed", ""
        if type(content) is not tuple or len(content) != 3 or content[0] != "raised":
            self._fail("crashed", "broke the protocol")
        name, text = self._texts(list(content[1:]))
        kinds = {"AssertionError": "wrong", "MemoryError": "memory", "SystemExit": "crashed"}
        return kinds.get(name, "exception"), text

    def describe_last(self) -> str:
        """The last answer in short."""
        return shown(self.last)

    def _fail(self, outcome: str, message: str = "") -> Any:
        self.stop = self.stop or Stop(outcome, message)
        raise self.stop

    def _texts(self, rest: list[Any]) -> tuple[str, str]:
        if len(rest) != 2 or not all(type(text) is str for text in rest):
            self._fail("crashed", "broke the protocol")
        return rest[0], rest[1][:400]

    def _raise(self, name: str, text: str) -> None:
        kind = getattr(builtins, name, None)
        if name == "MemoryError":
            self._fail("memory", text)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = Exception
        if not issubclass(kind, Exception):
            self._fail("crashed", f"tried to end the process: {text}")  # SystemExit, KeyboardInterrupt
        try:
            error = kind(text)
        except TypeError:
            error = Exception(text)  # one that wants other arguments, such as UnicodeDecodeError
        error.raised_by_program = text  # type: ignore[attr-defined]
        raise error

    def _request(self, *content: Any) -> tuple[Any, ...]:
        if self.stop is not None:
            raise self.stop
        self._number += 1
        if self._ahead:
            number, size = self._ahead.pop(0)
            assert number == self._number
            return self._receive(number, size)
        try:
            frame = Encoder(_REQUEST_LIMIT, self._number_of).frame((self._number, *content))
        except Unsendable as error:
            self._fail("unsafe", f"the tests give the program an object that is no plain data: {error}")
        except TooLarge as error:
            self._fail("unsafe", f"the tests give the program an argument {error}")
        try:
            self._channel.send(frame)
        except Closed:
            self._fail("")
        return self._receive(self._number, len(frame))

    def _receive(self, number: int, extra: int = 0) -> tuple[Any, ...]:
        self._channel.limit = self._limit + extra
        try:
            answer = Decoder(self._channel.receive(), self._object).value()
        except Closed:
            self._fail("")
        except (Oversized, TooLarge) as error:
            self._fail("output", f"an answer too large: {error}")
        except WireError as error:
            self._fail("crashed", f"broke the protocol: {error}")
        if type(answer) is not tuple or len(answer) < 2 or type(answer[1]) is not str or answer[0] != number:
            self._fail("crashed", "broke the protocol")
        if answer[1] == "large":
            self._fail("output", f"an answer too large: {shown(answer[2:])}")
        content: tuple[Any, ...] = answer[1:]
        return content

    def _object(self, number: int) -> Opaque:
        return self._objects.setdefault(number, Opaque(number))

    def _number_of(self, value: Any) -> int:
        if isinstance(value, Listed):
            value = value.handle
        if not isinstance(value, Opaque):
            raise Unsendable(f"type {type(value).__name__}")
        return value._number

    def _mirror(self, mine: Any, theirs: Any) -> None:
        if type(theirs) is not tuple or len(theirs) != 2:
            self._fail("crashed", "broke the protocol")
        _become(mine, theirs)


def _become(mine: Any, theirs: Any) -> Any:
    """Change `mine` in place into `theirs` where both are containers of one kind; what stands for `theirs`."""
    if compare.equal(theirs, mine):
        return mine
    if isinstance(mine, list) and type(theirs) is list:
        old = list(mine)
        mine[:] = [_become(old[i], item) if i < len(old) else item for i, item in enumerate(theirs)]
    elif isinstance(mine, dict) and type(theirs) is dict:
        before = dict(mine)
        mine.clear()
        mine.update({key: _become(before[key], item) if key in before else item for key, item in theirs.items()})
    elif isinstance(mine, set) and type(theirs) is set:
        mine.clear()
        mine.update(theirs)
    elif isinstance(mine, tuple) and type(theirs) is tuple and len(mine) == len(theirs):
        for old_item, item in zip(mine, theirs, strict=True):
            _become(old_item, item)
    else:
        return theirs
    return mine


def holds_mutable(value: Any) -> bool:
    """Whether a call may change something in an argument."""
    if isinstance(value, (list, dict, set, bytearray)):
        return True
    return isinstance(value, tuple) and any(map(holds_mutable, value))


def stand_in(session: Session, name: str) -> Any:
    """What the tests call in place of the program's function `name`."""

    def function(*args: Any, **kwargs: Any) -> Any:
        mirror = holds_mutable(args) or any(map(holds_mutable, kwargs.values()))
        return session.call("function", name, args, kwargs, mirror)

    function.__name__ = function.__qualname__ = name
    return function
