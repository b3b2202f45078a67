"""The client of SandboxFusion against a small server that speaks its `/run_code` and runs harmless programs."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward import remote
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    InProcessTests,
    Limits,
    Outcome,
    StdinCase,
    StdinTests,
    Submission,
    Tests,
)
from tests.unit.reward.attacks import ADD, RIGHT, expand
from tests.unit.reward.cheats import FORGED

pytestmark = pytest.mark.timeout(120)
LIMITS = Limits(cpu_s=1.0, wall_s=10.0, output_bytes=1 << 16)


class Fusion:
    """What a server of bytedance/SandboxFusion answers (sandbox/server/sandbox_api.py), without any isolation."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.before: list[tuple[int, dict[str, Any]]] = []
        """Answers given first, whatever is asked."""

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append(request)
        if self.before:
            return self.before.pop(0)
        if not isinstance(request.get("code"), str) or request.get("language") != "python":
            return 422, {"detail": [{"msg": "field required"}]}
        began = time.monotonic()
        result: dict[str, Any] = {"status": "Finished", "stderr": ""}
        try:
            done = subprocess.run(
                [sys.executable, "-c", request["code"]] if len(request["code"]) < 100_000 else [sys.executable, "-"],
                input=request["stdin"], capture_output=True, text=True, timeout=min(request["run_timeout"], 3.0),
            )  # fmt: skip
            result |= {"return_code": done.returncode, "stdout": done.stdout[: 1 << 20], "stderr": done.stderr}
        except subprocess.TimeoutExpired:
            result |= {"status": "TimeLimitExceeded", "return_code": None, "stdout": ""}
        result["execution_time"] = time.monotonic() - began
        status = "Success" if result["return_code"] == 0 else "Failed"
        return 200, {"status": status, "message": "", "compile_result": None, "run_result": result, "files": {}}


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Fusion, str]]:
    """The server and its address."""
    monkeypatch.setattr(remote, "REST_S", 0.02)
    monkeypatch.setattr(remote, "START_S", 0.5)
    state = Fusion()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/run_code"
            status, content = state.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config(url: str, **more: Any) -> JudgeConfig:
    return JudgeConfig(backend="sandbox_fusion", addresses=(url,), minimum_level="limits", **more)


def one(url: str, program: str, tests: Tests, all_tests: bool = False) -> tuple[Outcome, int, int]:
    """Outcome, tests passed, tests."""
    with Judge(config(url), allow_unsafe=True) as judge:
        (verdict,) = judge.judge([Submission(program, tests, LIMITS, all_tests=all_tests)])
    return verdict.outcome, verdict.passed, verdict.total


STDIN = StdinTests((StdinCase("1 2\n", "3\n"), StdinCase("4 5\n", "9\n"), StdinCase("1 1\n", "2\n")))
SUM = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("program", "outcome", "passed"),
    [
        (SUM, Outcome.PASSED, 3),
        ("print(3)", Outcome.WRONG, 1),
        ("print(3); import sys; sys.exit(3)", Outcome.CRASHED, 0),
        ("print(3); raise ValueError('x')", Outcome.EXCEPTION, 0),
        ("print(", Outcome.EXCEPTION, 0),
        ("raise MemoryError", Outcome.MEMORY, 0),
        ("import time; time.sleep(60)", Outcome.WALL_LIMIT, 0),
        ("print('x' * 100000)", Outcome.OUTPUT, 0),
    ],
)
def test_standard_input(program: str, outcome: Outcome, passed: int, fusion: tuple[Fusion, str]) -> None:
    """A run that had failed on the server counted as an answer, or an error of the server as one of the program."""
    state, url = fusion
    assert one(url, program, STDIN) == (outcome, passed, 3)
    probe, first, *_ = state.requests
    assert probe["code"] == "print(6 * 7)"
    assert first["stdin"] == "1 2\n"
    assert first["memory_limit_MB"] == LIMITS.memory_mb
    assert "3" not in json.dumps(first["stdin"])


def test_all_tests_are_counted(fusion: tuple[Fusion, str]) -> None:
    """The pass rate stopped at the first failure."""
    _, url = fusion
    assert one(url, "n = sum(map(int, input().split()))\nprint(0 if n == 3 else n)", STDIN, True) == (
        Outcome.WRONG,
        2,
        3,
    )
    assert one(url, "def add(a, b): return a + b if a > 0 else 9", ADD["calls"], True) == (Outcome.WRONG, 2, 3)


CALLS = CallTests("f", (CallCase(((1, 2), {"k": [None]}), (2, {"k"})), CallCase(((5,), {}), (1, set()))))


@pytest.mark.parametrize(
    ("program", "outcome", "passed"),
    [
        ("def f(t, d): return len(t), set(d)", Outcome.PASSED, 2),
        ("print('noise')\ndef f(t, d):\n    print('more', end='')\n    return len(t), set(d)", Outcome.PASSED, 2),
        ("def f(t, d): return [len(t), set(d)]", Outcome.WRONG, 0),
        ("def f(t, d): return len(t), {'k'}", Outcome.WRONG, 1),
        ("def f(t, d): return f", Outcome.WRONG, 0),
        ("def f(t, d): return len(t) // 0", Outcome.EXCEPTION, 0),
        ("def g(t, d): return 0", Outcome.MISSING, 0),
        ("def f(t, d): raise SystemExit", Outcome.EXCEPTION, 0),
        ("import os\ndef f(t, d): os._exit(0)", Outcome.CRASHED, 0),
        ("def f(t, d): return 'x' * 10**6", Outcome.OUTPUT, 0),
        ("def f(t, d):\n    x = []; x.append(x)\n    return x", Outcome.OUTPUT, 0),
        ("def f(t, d):\n    while True: pass", Outcome.WALL_LIMIT, 0),
    ],
)
def test_calls(program: str, outcome: Outcome, passed: int, fusion: tuple[Fusion, str]) -> None:
    """Function tasks could not be sent, or the program got to see what was expected."""
    state, url = fusion
    assert one(url, program, CALLS) == (outcome, passed, 2)
    assert len(state.requests) == 2


def test_forged_answers_are_not_paid(fusion: tuple[Fusion, str]) -> None:
    """A program that shares its process with the driver printed a verdict of its own."""
    _, url = fusion
    cases = [case for case in expand(FORGED) if case.kind == "calls" and case.attack.plain]
    spy = "import sys\nm = sys.modules['__main__']\nm._calls = []\nprint(m._mark + 'passed')\nm._say('ok', 5)\n"
    with Judge(config(url)) as judge:
        forged = judge.judge([case.submission({"token": "x"}) for case in cases])
        (spied,) = judge.judge([Submission(spy + "def add(a, b): return 0", ADD["calls"], LIMITS)])
        (right,) = judge.judge([Submission(RIGHT, ADD["calls"], LIMITS)])
    assert len(cases) > 10
    assert not any(verdict.ok for verdict in forged)
    assert not spied.ok
    assert right.ok


@pytest.mark.parametrize(
    "tests",
    [
        AssertTests("f", ("assert f(1) == 1",)),
        CallTests("f", (CallCase((1,), 1),), oracle="def accept(*a): return True"),
        StdinTests((StdinCase("", ""),), checker="print(1)"),
        InProcessTests("pass"),
    ],
    ids=["asserts", "oracle", "checker", "in process"],
)
def test_what_cannot_be_kept_apart_is_unsafe(tests: Tests, fusion: tuple[Fusion, str]) -> None:
    """Tests ran in the program's process, where it could read and change them."""
    state, url = fusion
    assert one(url, "def f(x): return x", tests) == (Outcome.UNSAFE, 0, 1)
    assert len(state.requests) == 1


def test_training_needs_a_word_for_the_fleet(fusion: tuple[Fusion, str]) -> None:
    """A fleet with `isolation: none` was taken for a sandbox."""
    _, url = fusion
    with pytest.raises(UserError, match="set it to limits if you vouch"):
        Judge(JudgeConfig(backend="sandbox_fusion", addresses=(url,)), training=True)
    with Judge(config(url), training=True) as judge:
        assert judge.level == "limits"


def test_errors_of_the_sandbox_are_tried_again(fusion: tuple[Fusion, str]) -> None:
    """An error of the sandbox was a reward of 0."""
    state, url = fusion
    error = (200, {"status": "SandboxError", "message": "no pod", "run_result": None, "compile_result": None})
    with Judge(config(url, retries=2)) as judge:
        state.before = [error, (503, {})]
        assert judge.judge([Submission(SUM, STDIN, LIMITS)])[0].ok
        state.before = [error] * 3
        (verdict,) = judge.judge([Submission(SUM, STDIN, LIMITS)])
    assert verdict.outcome is Outcome.LOST
    assert "SandboxError" in verdict.message or "3 attempts" in verdict.message


def test_server_that_runs_no_python_is_refused(fusion: tuple[Fusion, str]) -> None:
    """A fleet that was misconfigured judged every program wrong."""
    state, url = fusion
    result = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": ""}
    state.before = [(200, {"status": "Success", "message": "", "run_result": result})] * 50
    with pytest.raises(UserError, match="no judge answers"):
        Judge(config(url))
