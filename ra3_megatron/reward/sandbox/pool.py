"""INTERIM until the sandboxes stand: one plain subprocess per submission, no isolation. Replaced within the hour."""

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.problem import AssertTests, CallTests, InProcessTests, Outcome, StdinTests, Submission, Verdict


def _run(code: str, limit: float, stdin: str = "") -> tuple[str, str]:
    try:
        done = subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "cpu_limit", ""
    return ("passed" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]), done.stdout


class LocalPool:
    def __init__(self, config: JudgeConfig, *, training: bool) -> None:
        self.level = "files"
        self._threads = ThreadPoolExecutor(config.workers or 1)

    def submit(self, submission: Submission) -> "Future[Verdict]":
        return self._threads.submit(self._judge, submission)

    def close(self) -> None:
        self._threads.shutdown()

    def _judge(self, s: Submission) -> Verdict:
        t = s.tests
        passed = 0
        first: Outcome | None = None
        text = ""
        runs: list[tuple[str, str, str | None]]
        if isinstance(t, AssertTests):
            runs = [
                (f"{t.setup}\n{s.program}\ncandidate={t.entry_point}\n{test}", "", None) for test in t.tests
            ]
        elif isinstance(t, CallTests):
            f = f"{t.class_name}().{t.entry_point}" if t.class_name else t.entry_point
            tail = f"\n{t.oracle}\nassert accept(" if t.oracle else "\nassert ("
            runs = [
                (
                    f"{t.setup}\n{s.program}\n_a = {f}(*{c.args!r}){tail}"
                    + (f"{c.args!r}, _a, {c.expected!r})" if t.oracle else f"_a == {c.expected!r})"),
                    "",
                    None,
                )
                for c in t.cases
            ]
        elif isinstance(t, StdinTests):
            runs = [(s.program, c.stdin, c.stdout) for c in t.cases]
        else:
            assert isinstance(t, InProcessTests)
            runs = [(t.program, "", None)]
        for code, stdin, expected in runs:
            how, out = _run(code, s.limits.cpu_s, stdin)
            if how == "passed" and expected is not None and out.split() != expected.split():
                how = "AssertionError"
            if how == "passed":
                passed += 1
                continue
            outcome = (
                Outcome.CPU_LIMIT if how == "cpu_limit" else Outcome.WRONG if "AssertionError" in how else Outcome.EXCEPTION
            )
            first, text = first or outcome, text or how
            if not s.all_tests:
                break
        return Verdict(first or Outcome.PASSED, passed, len(runs), text)
