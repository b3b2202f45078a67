"""A client for SandboxFusion's `/run_code`, so that a fleet that stands already can be used (bytedance/SandboxFusion).

It runs a whole program and says what it printed. That is enough for tests on standard input, compared here, and for
calls with plain data: a driver sent along with the program prints the answers in the sandbox's own encoding, and the
expected values never leave this machine. A program can only print another answer, which is compared like any other.
Everything else (asserts, oracles, checkers, tests in the program's process) needs both sides in step or trusted code
and is refused as `UNSAFE`: use `judge.backend` local or service for such tasks.

SandboxFusion does not say how it keeps programs in, and what it ships with is no isolation; so it counts as level
`limits`, and training with it asks for `judge.minimum_level=limits`: whoever sets that vouches for the fleet. Its time
limit is wall time, and it reads a megabyte of output at most.
"""

import base64
import inspect
import secrets
import textwrap
import time
from typing import Any

import httpx2

from ra3_megatron.config.judge import LEVELS, JudgeConfig
from ra3_megatron.reward.guest import compare, wire
from ra3_megatron.reward.problem import (
    CallTests,
    Limits,
    Outcome,
    StdinTests,
    Submission,
    Verdict,
    count_tests,
)
from ra3_megatron.reward.remote import CONNECT_S, QUEUE_S, Busy, Failed, Refused, RemoteBackend, Server, retry_after
from ra3_megatron.reward.sandbox.pool import wall_limit

IN_FLIGHT = 16
"""Requests at once at an address unless `judge.workers` says otherwise; users report failures with 128."""
OUTPUT_CAP = 1 << 20
"""Bytes of output that a server gives back; the rest is lost without a word."""
_PREFIX = 4

_DRIVER = """
import base64 as _b, sys as _s, types as _t
_w = _t.ModuleType("wire")
exec(_b.b64decode({wire!r}), _w.__dict__)
_calls, _program, _mark, _limit = _w.loads(_b.b64decode({calls!r}))
_out = _s.stdout
def _say(*content):
    try: frame = _w.Encoder(_limit, lambda value: 0).frame(content)
    except _w.TooLarge: frame = _w.Encoder(1 << 20).frame(("large",))
    _out.write("\\n" + _mark + _b.b64encode(frame).decode() + "\\n"); _out.flush()
_space = {{"__name__": "program"}}
try:
    exec(compile(_program, "program", "exec"), _space)
    for _class, _name, _args in _calls:
        if (_class or _name) not in _space:
            _say("missing", _class or _name); break
        _say("ok", getattr(_space[_class](), _name)(*_args) if _class else _space[_name](*_args))
except MemoryError: _say("memory")
except BaseException as _e: _say("raise", type(_e).__name__ + ": " + str(_e)[:300])
"""


class FusionBackend(RemoteBackend):
    """SandboxFusion servers; one request per test on standard input, one per submission for calls."""

    def __init__(self, config: JudgeConfig, *, training: bool) -> None:
        super().__init__(config, training=training)

    def too_weak(self) -> str:
        """What to say when training asks for more isolation than is known of."""
        return (
            "judge.backend is sandbox_fusion, whose servers do not say how they keep programs in; "
            f"judge.minimum_level is '{self._config.minimum_level}'; set it to limits if you vouch for them"
        )

    async def probe(self, server: Server) -> None:
        """See that it runs Python."""
        result = await self._run(server, "print(6 * 7)", "", Limits())
        if result["stdout"].strip() != "42":
            raise Failed(f"answered {result['stdout'][:80]!r} to print(6 * 7)")
        server.level, server.capacity = LEVELS[0], self._config.workers or IN_FLIGHT

    async def ask(self, server: Server, submission: Submission) -> Verdict:
        """The verdict, from one server."""
        began = time.monotonic()
        match submission.tests:
            case StdinTests(checker="") as tests:
                outcome, passed, total, message = await self._stdin(server, submission, tests)
            case CallTests(oracle="") as tests:
                outcome, passed, total, message = await self._calls(server, submission, tests)
            case tests:
                outcome, passed, total = Outcome.UNSAFE, 0, count_tests(tests)
                message = f"SandboxFusion cannot run {type(tests).__name__} apart from the program; use another backend"
        return Verdict(outcome, passed, total, message, wall_s=time.monotonic() - began)

    async def _run(self, server: Server, code: str, stdin: str, limits: Limits, tests: int = 1) -> dict[str, Any]:
        """What a run came to: `run_result` of the answer, with text for what it printed."""
        # Loading counts as a test of its own, as in our own sandbox.
        seconds = (tests + 1) * wall_limit(limits)
        request = {
            "code": code,
            "language": "python",
            "stdin": stdin,
            "run_timeout": seconds,
            "memory_limit_MB": limits.memory_mb,
            "files": {},
            "fetch_files": [],
        }
        timeout = httpx2.Timeout(CONNECT_S, read=seconds + QUEUE_S, write=QUEUE_S)
        response = await self.client.post(f"{server.url}/run_code", json=request, timeout=timeout)
        if response.status_code in (429, 503, 504):
            raise Busy(retry_after(response))
        if response.status_code in (400, 413, 422):
            raise Refused(f"{response.status_code} {response.text[:200]}")
        try:
            content: Any = response.json() if response.status_code == 200 else None
            result = content["run_result"]
            if content["status"] not in ("Success", "Failed") or result["status"] == "Error":
                raise Failed(f"{content['status']}: {str(content.get('message'))[:200]}")
            return {**result, "stdout": result["stdout"] or "", "stderr": result["stderr"] or ""}
        except (ValueError, KeyError, TypeError):
            raise Failed(f"status {response.status_code}: {response.text[:200]}") from None

    async def _stdin(self, server: Server, submission: Submission, tests: StdinTests) -> tuple[Outcome, int, int, str]:
        first, passed, message = Outcome.PASSED, 0, ""
        for case in tests.cases:
            result = await self._run(server, submission.program, case.stdin, submission.limits)
            outcome, text = _ended(result, submission.limits)
            if outcome is Outcome.PASSED:
                text = compare.text(result["stdout"], case.stdout, tests.compare, tests.tolerance)
                outcome = Outcome.WRONG if text else Outcome.PASSED
            if outcome is Outcome.PASSED:
                passed += 1
                continue
            if first is Outcome.PASSED:
                first, message = outcome, text
            if not submission.all_tests:
                break
        return first, passed, len(tests.cases), message

    async def _calls(self, server: Server, submission: Submission, tests: CallTests) -> tuple[Outcome, int, int, str]:
        """All calls in one process, or, to go on after a failure, one process each."""
        cases, total = list(tests.cases), len(tests.cases)
        batches = [[case] for case in cases] if submission.all_tests else [cases]
        first, passed, message = Outcome.PASSED, 0, ""
        for batch in batches:
            mark = secrets.token_hex(16)
            try:
                code = _driver(submission, tests, [case.args for case in batch], mark)
            except wire.WireError as error:
                return Outcome.UNSAFE, 0, total, f"an argument of the tests cannot be sent: {error}"
            limits = submission.limits
            result = await self._run(server, code, "", limits, len(batch))
            answers = [line[len(mark) :] for line in result["stdout"].splitlines() if line.startswith(mark)]
            for index, case in enumerate(batch):
                answer = answers[index] if index < len(answers) else None
                outcome, text = _answered(answer, case.expected, tests, result, limits)
                if outcome is Outcome.PASSED:
                    passed += 1
                    continue
                if first is Outcome.PASSED:
                    first, message = outcome, text
                break
        return first, passed, total, message


def _driver(submission: Submission, tests: CallTests, arguments: list[tuple[Any, ...]], mark: str) -> str:
    """The program that makes the calls and prints the answers, each on a line that begins with `mark`."""
    calls = [(tests.class_name, tests.entry_point, args) for args in arguments]
    program = f"{tests.setup}\n{submission.program}"
    frame = wire.dumps((calls, program, mark, submission.limits.output_bytes))[_PREFIX:]
    source = base64.b64encode(inspect.getsource(wire).encode()).decode()
    return textwrap.dedent(_DRIVER).format(wire=source, calls=base64.b64encode(frame).decode())


def _ended(result: dict[str, Any], limits: Limits) -> tuple[Outcome, str]:
    """How a run ended, before anything is compared."""
    if result["status"] == "TimeLimitExceeded":
        return Outcome.WALL_LIMIT, "took more time than allowed"
    if len(result["stdout"].encode("utf-8", "replace")) >= min(limits.output_bytes, OUTPUT_CAP):
        return Outcome.OUTPUT, "printed more than allowed"
    if result["return_code"] == 0:
        return Outcome.PASSED, ""
    lines = result["stderr"].strip().splitlines() or [f"ended with exit code {result['return_code']}"]
    if lines[-1].startswith("MemoryError"):
        return Outcome.MEMORY, "used more memory than allowed"
    raised = "Traceback" in result["stderr"] or lines[-1].startswith(("SyntaxError", "IndentationError"))
    return Outcome.EXCEPTION if raised else Outcome.CRASHED, lines[-1][:300]


def _answered(
    answer: str | None, expected: Any, tests: CallTests, result: dict[str, Any], limits: Limits
) -> tuple[Outcome, str]:
    """What one answer of the driver is worth."""
    if answer is None:
        outcome, text = _ended(result, limits)
        return (Outcome.CRASHED, "ended before it had answered") if outcome is Outcome.PASSED else (outcome, text)
    try:
        # An object that is no plain data becomes one that equals nothing.
        content = wire.Decoder(base64.b64decode(answer, validate=True)[_PREFIX:], lambda _: object()).value()
    except (ValueError, RecursionError) as error:
        return Outcome.CRASHED, f"broke the protocol: {error}"
    match content:
        case ("ok", value):
            return _compared(value, expected, tests)
        case ("large",):
            return Outcome.OUTPUT, "an answer larger or deeper than allowed"
        case ("memory",):
            return Outcome.MEMORY, "used more memory than allowed"
        case ("missing", name):
            return Outcome.MISSING, f"the program does not define {str(name)[:80]!r}"
        case ("raise", text):
            return Outcome.EXCEPTION, str(text)[:300]
    return Outcome.CRASHED, "broke the protocol"


def _compared(value: Any, expected: Any, tests: CallTests) -> tuple[Outcome, str]:
    if tests.compare == "equal":
        right = compare.equal(value, expected)
    elif tests.compare == "close":
        right = compare.close(value, expected, tests.atol)
    else:
        right = compare.as_json(value, expected)
    return (Outcome.PASSED, "") if right else (Outcome.WRONG, f"answered {value!r:.200}")
