"""The runners that the attacks are meant for: program and tests in one process, the exit code is the verdict."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ra3_megatron.reward.problem import AssertTests, CallTests, StdinTests, Submission

SERVER = """
import atexit, json, os, sys
for line in sys.stdin:
    job = json.loads(line)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        folder, code = job["folder"], job["code"]
        os.chdir(folder)
        sys.argv, sys.stdin = ["program"], open(job["stdin"])
        out = os.open(job["stdout"], os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1); os.dup2(out, 2); os.dup2(sys.stdin.fileno(), 0)
        namespace = {"__name__": "__main__"}
        try:
            exec(code, namespace)
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 0 if e.code is None else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            atexit._run_exitfuncs()
            os._exit(1)
        sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""


def script(submission: Submission) -> list[tuple[str, str, str | None]]:
    """(code, standard input, standard output asked for) of each process that a plain runner starts."""
    tests, program = submission.tests, submission.program
    if isinstance(tests, AssertTests):
        lines = "\n".join(tests.tests)
        return [(f"{program}\n{tests.setup}\ncandidate = {tests.entry_point}\n{lines}\n", "", None)]
    if isinstance(tests, CallTests):
        cases = [(case.args, case.expected) for case in tests.cases]
        run = (
            f"def judge(cases):\n    for args, expected in cases:\n        answer = {tests.entry_point}(*args)\n"
            f"        assert answer == expected\njudge({cases!r})\n"
        )
        return [(f"{program}\n{run}", "", None)]
    assert isinstance(tests, StdinTests)
    return [(program, case.stdin, case.stdout) for case in tests.cases]


def paid_by_plain(submissions: Iterable[Submission]) -> list[bool]:
    """Whether a plain runner pays each submission. Starts one process and forks it: only for harmless attacks."""
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        assert server.stdin is not None
        assert server.stdout is not None
        verdicts = []
        for number, submission in enumerate(submissions):
            paid = True
            for code, stdin, expected in script(submission):
                place = Path(folder, str(number))
                place.mkdir(exist_ok=True)
                (place / "stdin").write_text(stdin)
                (place / "stdout").write_text("")
                job = {"folder": str(place), "code": code}
                job |= {"stdin": str(place / "stdin"), "stdout": str(place / "stdout")}
                server.stdin.write(json.dumps(job) + os.linesep)
                server.stdin.flush()
                code_ended = json.loads(server.stdout.readline())
                right = expected is None or (place / "stdout").read_text().split() == expected.split()
                paid = paid and code_ended == 0 and right
            verdicts.append(paid)
        server.stdin.close()
        server.wait(timeout=60)
        return verdicts
