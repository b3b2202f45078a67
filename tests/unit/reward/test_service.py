"""The judge behind HTTP, for real over loopback: verdicts, secret, back-pressure, size of requests, a graceful stop."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import CallCase, CallTests, Limits, Outcome, Submission
from ra3_megatron.reward.protocol import HEALTH_PATH, JUDGE_PATH, MAX_BODY, pack_submission, unpack_verdict
from ra3_megatron.reward.service import is_loopback, serve
from tests.unit.reward.attacks import ALL, Kind, control

ROOT = Path(__file__).parents[3]
SECRET = "a-secret-for-tests-only"
pytestmark = pytest.mark.timeout(120)


def sleeper(seconds: float) -> Submission:
    """A right program that takes its time."""
    program = f"import time\ndef f():\n    time.sleep({seconds})\n    return 1"
    return Submission(program, CallTests("f", (CallCase((), 1),)), Limits(cpu_s=1.0))


@contextmanager
def service(folder: Path, *overrides: str, secret: str | None = SECRET, port: int = 0) -> Iterator[tuple[str, Any]]:
    """A service of one worker, its address and its process."""
    arguments = [*overrides, "judge.workers=1"]
    if secret is not None:
        (folder / "secret").write_text(secret)
        (folder / "secret").chmod(0o600)
        arguments.append(f"judge.secret_file={folder / 'secret'}")
    command = [sys.executable, "-m", "ra3_megatron", "judge", "serve", "--port", str(port), *arguments]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"judging at (http://127\.0\.0\.1:\d+) \(level (\w+), 1 workers\)", line)
        assert found is not None, line + (folder / "log").read_text()
        yield found[1], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A service that several tests share."""
    folder = tmp_path_factory.mktemp("service")
    with service(folder, "judge.max_pending=4") as (url, _):
        yield url, folder


def headers(secret: str = SECRET) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def config(*urls: str, folder: Path | None = None, **more: Any) -> JudgeConfig:
    """A client's configuration."""
    secret = None if folder is None else str(folder / "secret")
    return JudgeConfig(backend="service", addresses=urls, secret_file=secret, **more)


@pytest.mark.parametrize("kind", ALL)
def test_verdicts_are_those_of_the_judge(kind: Kind, running: tuple[str, Path]) -> None:
    """Over HTTP a right program failed, or a wrong one passed."""
    url, folder = running
    wrong = Submission("def add(a, b):\n    return a * b\nprint('no')", control(kind).tests)
    with Judge(config(url, folder=folder)) as judge:
        right, false = judge.judge([control(kind), wrong])
    assert (right.outcome, right.passed, right.total) == (Outcome.PASSED, 3, 3), right
    assert false.outcome is Outcome.WRONG, false


def test_training_can_use_a_service(running: tuple[str, Path]) -> None:
    """Training refused every service, or took one below the minimum."""
    url, folder = running
    state = httpx2.get(url + HEALTH_PATH, headers=headers()).json()
    assert state["workers"] == 1
    assert state["capacity"] == 4
    if state["level"] == "namespaces":
        with Judge(config(url, folder=folder, minimum_level="namespaces"), training=True) as judge:
            assert judge.level == "namespaces"
    else:
        with pytest.raises(UserError, match="minimum_level"):
            Judge(config(url, folder=folder, minimum_level="namespaces"), training=True)


def test_wrong_secret_is_told_at_the_start(running: tuple[str, Path], tmp_path: Path) -> None:
    """With a wrong secret every sample of the run was lost, one by one."""
    url, _ = running
    (tmp_path / "secret").write_text("another-secret-for-tests")
    (tmp_path / "secret").chmod(0o600)
    for folder in (tmp_path, None):
        with pytest.raises(UserError, match="refuses the secret"):
            Judge(config(url, folder=folder))


def test_nothing_is_said_without_the_secret(running: tuple[str, Path]) -> None:
    """The queue's state, or a verdict, was given to anybody on the network."""
    url, _ = running
    body = pack_submission(control("calls"))
    for given in ({}, headers("wrong"), headers(SECRET + "x"), headers(SECRET[:-1]), {"Authorization": SECRET}):
        assert httpx2.get(url + HEALTH_PATH, headers=given).status_code == 401
        assert httpx2.post(url + JUDGE_PATH, content=body, headers=given).status_code == 401


def test_bad_requests_are_refused(running: tuple[str, Path]) -> None:
    """A malformed or a giant request took the service down."""
    url, _ = running
    assert httpx2.post(url + JUDGE_PATH, content=b"{}", headers=headers()).status_code == 400
    empty = pack_submission(Submission("", CallTests("f", ())))
    refused = httpx2.post(url + JUDGE_PATH, content=empty, headers=headers())
    assert refused.status_code == 400
    assert "no tests" in refused.json()["error"]

    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY // (1 << 20) + 1):
            yield bytes(1 << 20)

    # The service may have answered and hung up before all was sent.
    with contextlib.suppress(httpx2.WriteError):
        assert httpx2.post(url + JUDGE_PATH, content=pieces(), headers=headers(), timeout=60).status_code == 413
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", JUDGE_PATH)
    for name, value in {**headers(), "Content-Length": str(MAX_BODY + 1)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert httpx2.get(url + HEALTH_PATH, headers=headers()).json()["pending"] == 0


def test_full_queue_answers_503(running: tuple[str, Path]) -> None:
    """The service took everything, and its clients ran into their deadlines."""
    url, _ = running
    body, answers = pack_submission(sleeper(2.0)), []

    def post() -> None:
        answers.append(httpx2.post(url + JUDGE_PATH, content=body, headers=headers(), timeout=60))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 4 + [503] * 4
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
    assert all(unpack_verdict(a.content).ok for a in answers if a.status_code == 200)


def test_client_waits_for_a_full_service(running: tuple[str, Path]) -> None:
    """Back-pressure of the service lost samples of the run."""
    url, folder = running
    with Judge(config(url, folder=folder)) as one, Judge(config(url, folder=folder)) as other:
        futures = [judge.submit(sleeper(0.2)) for _ in range(5) for judge in (one, other)]
        assert [future.result(100).outcome for future in futures] == [Outcome.PASSED] * 10


def test_client_that_hangs_up_frees_the_queue(running: tuple[str, Path]) -> None:
    """Programs of a trainer that had died were still judged, before those of the living."""
    url, _ = running
    body = pack_submission(sleeper(1.0))
    for _ in range(3):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url + JUDGE_PATH, content=body, headers=headers(), timeout=0.3)
    until = time.monotonic() + 60
    while httpx2.get(url + HEALTH_PATH, headers=headers()).json()["pending"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_sigterm_lets_requests_end(tmp_path: Path) -> None:
    """A stopped service cut off the programs it was judging, and left its sandboxes behind."""
    answers: list[httpx2.Response] = []
    with service(tmp_path) as (url, process):
        body = pack_submission(sleeper(1.5))
        thread = threading.Thread(
            target=lambda: answers.append(httpx2.post(url + JUDGE_PATH, content=body, headers=headers(), timeout=60))
        )
        thread.start()
        until = time.monotonic() + 30
        while not httpx2.get(url + HEALTH_PATH, headers=headers()).json()["pending"]:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert process.wait(60) == 0
    assert unpack_verdict(answers[0].content).ok
    log = (tmp_path / "log").read_text()
    assert SECRET not in log
    assert "Traceback" not in log


def test_open_address_needs_a_secret(tmp_path: Path) -> None:
    """A service without a secret on 0.0.0.0 ran anybody's programs."""
    for host in ("0.0.0.0", "::", "judge.example"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match=r"judge\.secret_file is not set"):
            serve(host, 0, JudgeConfig(workers=1))
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost")))


def test_taken_port_is_a_user_error(tmp_path: Path) -> None:
    """A second service on one port ended with a traceback."""
    with service(tmp_path, secret=None) as (url, _):
        with pytest.raises(UserError, match="cannot listen"):
            serve("127.0.0.1", int(url.rsplit(":", 1)[1]), JudgeConfig(workers=1))
        with Judge(config(url)) as judge:
            assert judge.judge([control("stdin")])[0].ok


def test_service_judges_on_its_own_machine() -> None:
    """A service that forwards to itself never answers."""
    with pytest.raises(UserError, match=r"judge\.backend=local"):
        serve("127.0.0.1", 0, JudgeConfig(backend="service", addresses=("http://x",)))
