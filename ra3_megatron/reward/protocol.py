"""Submissions and verdicts as JSON between a judge service and its clients: strict in both directions.

Arguments and expected values of calls are bytes of the sandbox's own encoding of plain data, in base64; everything else
is as in `problem.py`, field by field. Nothing is unpickled, and what does not fit the types is refused.
"""

import base64
import binascii
import json
import math
import stat
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ra3_megatron.config.errors import UserError
from ra3_megatron.reward.guest.wire import WireError, dumps, loads
from ra3_megatron.reward.problem import AssertTests, CallTests, InProcessTests, StdinTests, Submission, Verdict

FORMAT = 1
"""Of the messages; another number is refused."""
MAX_BODY = 64 << 20
"""Largest request, bytes."""
JUDGE_PATH, HEALTH_PATH = "/judge", "/health"
_KINDS: dict[str, type] = {
    "asserts": AssertTests, "calls": CallTests, "stdin": StdinTests, "in_process": InProcessTests
}  # fmt: skip
_MIN_SECRET = 16
_PREFIX = 4
"""Bytes of a frame that hold its length; JSON has lengths of its own."""


class ProtocolError(ValueError):
    """A message that is not one of this protocol."""


def pack_submission(submission: Submission) -> bytes:
    """The request body. Raises ProtocolError for values of calls that are no plain data."""
    return json.dumps({"format": FORMAT, **_pack(submission)}).encode("ascii")


def unpack_submission(body: bytes) -> Submission:
    """What `pack_submission` packed. Raises ProtocolError for anything else."""
    return _unpack_message(body, Submission)


def pack_verdict(verdict: Verdict) -> bytes:
    """The answer's body."""
    return json.dumps({"format": FORMAT, **_pack(verdict)}).encode("ascii")


def unpack_verdict(body: bytes) -> Verdict:
    """What `pack_verdict` packed. Raises ProtocolError for anything else."""
    return _unpack_message(body, Verdict)


def read_secret(path: str) -> str:
    """The secret in a file, without space around it.

    Raises:
        UserError: it cannot be read, others can read it too, or it is too short to be one.
    """
    try:
        mode = Path(path).stat().st_mode
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge.secret_file {path} cannot be read: {error}; give a text file with the secret") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"judge.secret_file {path} can be read by others (mode {mode & 0o777:o}); chmod 600 {path}")
    if len(secret) < _MIN_SECRET or not secret.isascii() or not secret.isprintable():
        raise UserError(
            f"judge.secret_file {path} holds {len(secret)} characters; give at least {_MIN_SECRET} printable ASCII "
            "ones, such as those of: openssl rand -hex 32"
        )
    return secret


def _pack(value: Any) -> Any:
    """A dataclass of `problem.py` as JSON types."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, tuple):
        return [_pack(item) for item in value]
    if not is_dataclass(value):
        return value
    hints = get_type_hints(type(value))
    content = {
        f.name: _pack_plain(getattr(value, f.name)) if _is_plain(hints[f.name]) else _pack(getattr(value, f.name))
        for f in fields(value)
    }
    kind = next((name for name, cls in _KINDS.items() if cls is type(value)), None)
    return content if kind is None else {"kind": kind, **content}


def _is_plain(hint: Any) -> bool:
    """Whether a field holds data of a task, of any plain type."""
    return hint is Any or hint == tuple[Any, ...]


def _pack_plain(value: Any) -> str:
    try:
        return base64.b64encode(dumps(value)[_PREFIX:]).decode("ascii")
    except WireError as error:
        raise ProtocolError(f"a value of the tests cannot be sent: {error}") from None


def _unpack_message[T](body: bytes, cls: type[T]) -> T:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ProtocolError(f"not of format {FORMAT}; client and server are of different versions")
    return _unpack(cls, content, cls.__name__.lower())


def _unpack(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` says, or ProtocolError."""
    origin = get_origin(hint)
    if hint in (str, bool) and type(value) is hint:
        return value
    if hint is int and type(value) is int:
        return value
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is bytes:
        return _base64(value, where)
    if origin is Literal and value in get_args(hint):
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_unpack(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (Union, types.UnionType) and isinstance(value, dict) and value.get("kind") in _KINDS:
        value = dict(value)
        return _unpack(_KINDS[value.pop("kind")], value, where)
    if origin in (Union, types.UnionType) and type(None) in get_args(hint):
        return None if value is None else _unpack(get_args(hint)[0], value, where)
    if is_dataclass(hint) and isinstance(value, dict):
        return _unpack_fields(hint, value, where)
    if isinstance(hint, type) and issubclass(hint, str) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            pass
    raise ProtocolError(f"{where} is {str(value)[:80]!r}, which is not {hint}")


def _unpack_fields(cls: Any, content: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    if set(content) != set(hints):
        raise ProtocolError(f"{where} has the fields {', '.join(sorted(content))}, not {', '.join(sorted(hints))}")
    values = {}
    for name, hint in hints.items():
        place = f"{where}.{name}"
        if not _is_plain(hint):
            values[name] = _unpack(hint, content[name], place)
            continue
        try:
            values[name] = loads(_base64(content[name], place))
        except WireError as error:
            raise ProtocolError(f"{place}: {error}") from None
        if hint is not Any and type(values[name]) is not tuple:
            raise ProtocolError(f"{place} is no tuple")
    return cls(**values)


def _base64(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ProtocolError(f"{where} is no base64") from None
