"""The trusted process of a sandbox: takes jobs, has programs run by the fork server, and says how they did."""

import fcntl
import json
import os
import select
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from . import asserts, checkers, compare, jail, trusted, zygote
from .asserts import Plan
from .channel import Channel, Closed
from .remove import empty
from .session import Session, Stop
from .supervise import STRETCH, Broken, Ended, Link, Meter, Watch
from .wire import dumps, loads

TRUSTED_CPU_S = 10.0
"""Processor seconds of one test that the data set's own code may take, at least."""
TRUSTED_MEMORY_MB = 4096
_ERRORS_KEPT = 2000
_ERRORS_READ = 1 << 20


@dataclass
class Score:
    """Tests so far."""

    total: int
    passed: int = 0
    outcome: str = "passed"
    message: str = ""
    cpu: float = 0.0

    def count(self, outcome: str, message: str) -> bool:
        """Take one test's result; whether it passed. The first failure is what is reported."""
        if outcome == "passed":
            self.passed += 1
            return True
        if self.outcome == "passed":
            self.outcome, self.message = outcome, message
        return False


class Referee:
    """Judges one job at a time."""

    def __init__(self, link: Link, walls: jail.Walls, folder: str) -> None:
        self._link = link
        self._walls = walls
        self._folder = folder
        self._null = os.open("/dev/null", os.O_RDWR)

    def judge(self, job: dict[str, Any]) -> dict[str, Any]:
        """The verdict on a job as plain data.

        Raises:
            Broken: the sandbox has failed.
        """
        started = time.monotonic()
        kind = job["kind"]
        score = Score(len(job.get("tests") or job.get("cases") or (1,)))
        if kind == "stdin":
            self._stdin(job, score)
        elif kind == "in_process":
            self._in_process(job, score)
        else:
            self._calls(job, score)
        return {
            "outcome": score.outcome,
            "passed": score.passed,
            "total": score.total,
            "message": score.message,
            "cpu": score.cpu,
            "wall": time.monotonic() - started,
        }

    def probe(self) -> dict[str, Any]:
        """What a jailed process can still do."""
        ours, theirs = socket.socketpair()
        job = {"cpu": 10.0, "wall": 60.0, "memory": 1024, "limit": 1 << 16, "stretch": True}
        with ours, theirs:
            watch = self._start("probe", job, b"", (self._null,) * 3, theirs)
            ours.setblocking(False)
            try:
                found: dict[str, Any] = loads(Channel(ours.fileno(), 1 << 16, watch.wait).receive())
            except (Closed, Ended) as error:
                raise Broken(f"a jailed process cannot be started: {watch.ended().message}") from error
            watch.finish()
        return found

    # Starting programs

    def _start(
        self,
        mode: str,
        job: dict[str, Any],
        source: bytes,
        files: tuple[int, int, int],
        channel: socket.socket | None = None,
        tests: int = 1,
        data: int = 0,
    ) -> Watch:
        fd = _memory_file("program", source)
        try:
            order = zygote.order(mode, cpu_s=job["cpu"] * tests, memory_mb=job["memory"], limit=job["limit"], data=data)
            pid = self._link.spawn(order, (*files, channel.fileno() if channel else self._null, fd))
        finally:
            os.close(fd)
        if channel is not None:
            channel.close()
        return Watch(self._link, pid, job["cpu"], job["wall"], STRETCH if job["stretch"] else 1.0)

    # Programs that answer calls

    def _calls(self, job: dict[str, Any], score: Score) -> None:
        """Rounds of one program process each: a new one goes on after the test that ended the last."""
        first = 0
        plan = asserts.plan(job) if job["kind"] == "assert" else None
        plain = plan is not None or (job["kind"] == "call" and not job["oracle"])
        while first < score.total:
            ours, theirs = socket.socketpair()
            with ours:
                source = (job["before"] + job["program"]).encode("utf-8", "surrogatepass")
                files = (self._null,) * 3
                watch = self._start("serve", job, source, files, theirs, tests=score.total - first + 1)
                try:
                    if plain:
                        first = self._plain(job, plan, score, watch, ours, first)
                    else:
                        first = self._with_trusted(job, score, watch, ours, first)
                finally:
                    score.cpu += watch.end().cpu
            if score.outcome != "passed" and not job["all_tests"]:
                return

    def _plain(
        self, job: dict[str, Any], plan: Plan | None, score: Score, watch: Watch, ours: socket.socket, first: int
    ) -> int:
        """Call and compare here: no code of the data set is involved. The number of the test to go on with."""
        ours.setblocking(False)
        session = Session(Channel(ours.fileno(), job["limit"], watch.wait), job["limit"])
        try:
            session.load(job["class_name"] or job["entry_point"])
            if plan is None:
                test = trusted.plain_cases(session, job)
            else:
                test = plan.start(session, _trusted_cpu(job), ahead=not job["all_tests"])
        except (Stop, Ended) as reason:
            score.count(*_settled(reason, watch))
            return score.total
        for index in range(first, score.total):
            watch.start_test()
            try:
                outcome, message = test(index)
            except (Stop, Ended) as reason:
                score.count(*_settled(reason, watch))
                return index + 1
            if not score.count(outcome, message) and not job["all_tests"]:
                return score.total
        return score.total

    def _with_trusted(self, job: dict[str, Any], score: Score, watch: Watch, ours: socket.socket, first: int) -> int:
        """Have the data set's code call the program from a process of its own."""
        work = trusted.assert_tests if job["kind"] == "assert" else trusted.oracle_tests
        read, write = os.pipe()

        def run() -> None:
            work(3, 4, job, first)

        pid = self._fork_trusted(run, (ours.fileno(), write))
        os.close(write)
        ours.close()
        watch.meters.append(Meter(pid, _trusted_cpu(job), "the tests' own code"))
        try:
            return self._follow(job, score, watch, read, first)
        finally:
            os.close(read)
            checkers.end(pid)

    def _follow(self, job: dict[str, Any], score: Score, watch: Watch, read: int, first: int) -> int:
        """Read what the trusted process reports, until it has nothing more to say."""
        index, buffer, running = first, b"", False
        while True:
            try:
                while b"\n" not in buffer:
                    watch.wait(read, False, stay=True)
                    part = os.read(read, 65536)
                    if not part:
                        raise Broken("the process with the tests ended without a report")
                    buffer += part
                text, buffer = buffer.split(b"\n", 1)
            except Ended as reason:
                score.count(reason.outcome, reason.message)
                return index + 1 if running else score.total
            line = json.loads(text)
            if "start" in line:
                index, running = line["start"], True
                watch.start_test()
                continue
            outcome, message = line["outcome"], line["message"]
            if not outcome:
                end = watch.ended()
                outcome, message = end.outcome, end.message
            passed = score.count(outcome, message)
            if line.get("loading"):
                return score.total
            index = line["end"] + 1
            if index == score.total or (not passed and not job["all_tests"]):
                return score.total
            if line["last"]:
                return index

    def _fork_trusted(self, run: Callable[[], None], fds: tuple[int, ...]) -> int:
        """Run trusted code in a jailed child that has `fds` as descriptors 3, 4, ... only; its process id."""
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            jail.take((self._null, self._null, self._null, *fds))
            jail.close_gate(self._walls, 3600.0, TRUSTED_MEMORY_MB, parent)
            run()
            os._exit(0)
        finally:
            os._exit(98)
        raise AssertionError("unreachable")

    # Programs that run as processes

    def _stdin(self, job: dict[str, Any], score: Score) -> None:
        source = job["program"].encode("utf-8", "surrogatepass")
        for index, (given, expected) in enumerate(job["cases"]):
            outcome, message = self._stdin_case(job, source, given, expected, score)
            if not score.count(outcome, message and f"case {index + 1}: {message}") and not job["all_tests"]:
                return

    def _stdin_case(
        self, job: dict[str, Any], source: bytes, given: str, expected: str, score: Score
    ) -> tuple[str, str]:
        stdin = _memory_file("stdin", given.encode("utf-8", "surrogateescape"))
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            watch = self._start("script", job, source, (stdin, out_write, err_write))
        finally:
            for fd in (stdin, out_write, err_write):
                os.close(fd)
        try:
            printed, errors = _drain(watch, out_read, err_read, job["limit"])
            status = watch.finish().status
        except Ended as reason:
            return reason.outcome, reason.message
        finally:
            os.close(out_read)
            os.close(err_read)
            score.cpu += watch.end().cpu
        if status:
            return _failed_run(watch, status, errors)
        text = printed.decode("utf-8", "replace")
        if job["checker"]:
            return self._check(job, given, text, expected)
        wrong = compare.text(text, expected, job["compare"], job["tolerance"])
        return ("wrong", wrong) if wrong else ("passed", "")

    def _check(self, job: dict[str, Any], given: str, printed: str, expected: str) -> tuple[str, str]:
        """Let the data set's checker decide, in a process of its own."""
        read, write = os.pipe()

        def run() -> None:
            trusted.checker(3, job["checker"], (given, printed, expected))

        pid = self._fork_trusted(run, (write,))
        os.close(write)
        meter = Meter(pid, _trusted_cpu(job), "the checker")
        try:
            said, status = checkers.hear(pid, read, meter, job["wall"])
        finally:
            os.close(read)
            empty(self._folder)
        if status is None:
            return "cpu_limit", "the checker took too long over the output"
        return ("passed", "") if checkers.accepts(said, status) else ("wrong", f"the checker says {said[:200]!r}")

    # Tests that share the program's process

    def _in_process(self, job: dict[str, Any], score: Score) -> None:
        data, source = job["data"], job["program"].encode("utf-8", "surrogatepass")
        ours, theirs = socket.socketpair()
        with ours:
            files = (self._null,) * 3
            watch = self._start("in_process", job, data + source, files, theirs, data=len(data))
            ours.setblocking(False)
            session = Session(Channel(ours.fileno(), 1 << 16, watch.wait), 1 << 16)
            try:
                score.count(*session.report())
            except (Stop, Ended) as reason:
                score.count(*_settled(reason, watch))
            finally:
                score.cpu += watch.end().cpu


def _trusted_cpu(job: dict[str, Any]) -> float:
    """Processor seconds of the data set's side of one test."""
    return max(TRUSTED_CPU_S, 2 * float(job["cpu"]))


def _settled(reason: Stop | Ended, watch: Watch) -> tuple[str, str]:
    """Outcome and message; where only the end of the process is known, its exit says which."""
    if not reason.outcome:
        reason = watch.ended()
    return reason.outcome, reason.message


def _memory_file(name: str, content: bytes) -> int:
    """A file in memory with `content`, read from its start and sealed against writing."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _drain(watch: Watch, out: int, err: int, limit: int) -> tuple[bytes, bytes]:
    """Everything printed, and the end of what went to the error output."""
    poll = select.poll()
    poll.register(out, select.POLLIN)
    poll.register(err, select.POLLIN)
    printed, errors, wasted = bytearray(), b"", 0
    left = {out, err}
    while left:
        for fd in watch.ready(poll):
            part = os.read(fd, 1 << 16)
            if not part:
                poll.unregister(fd)
                left.discard(fd)
            elif fd == out:
                printed += part
            else:
                wasted += len(part)
                errors = (errors + part)[-_ERRORS_KEPT:]
        if len(printed) > limit or wasted > max(limit, _ERRORS_READ):
            watch.stop("output", f"printed more than {limit} bytes")
    return bytes(printed), errors


def _failed_run(watch: Watch, status: int, errors: bytes) -> tuple[str, str]:
    """Outcome of a run that ended with something else than 0."""
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1][:300] if lines else ""
    if os.WIFEXITED(status):
        code = os.WEXITSTATUS(status)
        if last.startswith("MemoryError"):
            return "memory", last
        if (code == 1 and any(line.startswith("Traceback ") for line in lines)) or "Error" in last:
            return "exception", last
        return "crashed", f"ended with {code}; {last}".rstrip("; ")
    reason = watch.ended()
    return reason.outcome, reason.message


def serve(sock: socket.socket, referee: Referee, end: Callable[[int], NoReturn]) -> NoReturn:
    """Take jobs until the other side closes, then `end` with an exit code; a failure of the sandbox ends it too."""
    channel = Channel(sock.fileno(), 1 << 31)
    code = 0
    try:
        while True:
            try:
                job = loads(channel.receive())
            except Closed:
                break
            try:
                channel.send(dumps(referee.judge(job)))
            except Exception:  # noqa: BLE001 - told to the pool, which starts a new sandbox
                channel.send(dumps({"broken": traceback.format_exc()}))
                code = 1
                break
    finally:
        end(code)
    raise AssertionError("unreachable")
