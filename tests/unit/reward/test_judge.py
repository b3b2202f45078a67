"""The judge as the trainer sees it: levels, refusals, order, back-pressure, failures of the machinery, its end."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
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
)
from ra3_megatron.reward.sandbox import level as levels

ROOT = Path(__file__).parents[3]
RIGHT = Submission("def f(x): return x", AssertTests("f", ("assert f(1) == 1",)))
WRONG = Submission("def f(x): return 0", AssertTests("f", ("assert f(1) == 1",)))
SLOW = Submission("import time\ndef f(x): time.sleep(60)", AssertTests("f", ("assert f(1) == 1",)))


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def new_children(before: set[int]) -> list[psutil.Process]:
    return [child for child in children() if child.pid not in before]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_all(before: set[int]) -> None:
    for child in new_children(before):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_the_trainer_gets_no_torch_by_importing_it() -> None:
    """The worker processes of a data loader imported torch through the judge and took gigabytes."""
    code = (
        "import sys\nimport ra3_megatron.reward.judge, ra3_megatron.reward.sandbox.pool\n"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_guests_import_the_standard_library_only() -> None:
    """What runs in a sandbox could not start without the project's dependencies."""
    import ast

    for path in (ROOT / "ra3_megatron" / "reward" / "guest").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] in sys.stdlib_module_names, path


def test_order_is_kept_and_verdicts_are_told_as_they_come(judge: Judge) -> None:
    """Verdicts came back in the order in which programs ended."""
    submissions = [RIGHT, WRONG] * 6
    seen: dict[int, bool] = {}
    verdicts = judge.judge(submissions, on_verdict=lambda index, verdict: seen.update({index: verdict.ok}))
    assert [v.ok for v in verdicts] == [True, False] * 6
    assert seen == dict(enumerate([True, False] * 6))


def test_futures_can_be_awaited(judge: Judge) -> None:
    """A rollout server on asyncio waits for verdicts without a thread each."""

    async def both() -> list[bool]:
        futures = [asyncio.wrap_future(judge.submit(s)) for s in (RIGHT, WRONG)]
        return [v.ok for v in await asyncio.gather(*futures)]

    assert asyncio.run(both()) == [True, False]


def test_training_never_runs_tests_in_the_programs_process() -> None:
    """A reward came from tests that the program could rewrite."""
    submission = Submission("", InProcessTests("x = 1"))
    with Judge(JudgeConfig(workers=1, minimum_level="limits"), training=True) as judge:
        assert judge.judge([submission])[0].outcome is Outcome.UNSAFE
    with pytest.raises(UserError, match="can be cheated"):
        Judge(JudgeConfig(workers=1), training=True, allow_unsafe=True)


def test_in_process_tests(judge: Judge) -> None:
    """Passed is to reach the end, not to exit with 0."""
    for program, outcome in (
        ("assert RA3_DATA == b'12'", Outcome.PASSED),
        ("import sys; sys.exit(0)", Outcome.CRASHED),
        ("import os; os._exit(0)", Outcome.CRASHED),
        ("assert 1 == 2, 'no'", Outcome.WRONG),
        ("1 / 0", Outcome.EXCEPTION),
        ("bytearray(10**12)", Outcome.MEMORY),
        ("import time; time.sleep(60)", Outcome.WALL_LIMIT),
    ):
        result = judge.judge([Submission("", InProcessTests(program, b"12", wall_s=2.0))])[0]
        assert result.outcome is outcome, (program, result)
    with Judge(JudgeConfig(workers=1)) as other:
        assert other.judge([Submission("", InProcessTests("x = 1"))])[0].outcome is Outcome.UNSAFE


def test_training_refuses_a_level_below_the_minimum() -> None:
    """Rewards were computed without isolation, and only a log line said so."""
    config = JudgeConfig(workers=1, namespaces="none", minimum_level="namespaces")
    before = {child.pid for child in children()}
    with pytest.raises(UserError, match=r"isolation level namespaces .*reaches isolation level") as refused:
        Judge(config, training=True)
    assert "\n" not in str(refused.value)
    assert not new_children(before)


def test_levels_follow_from_what_was_possible() -> None:
    """The level was what had been asked for, whatever a program could do."""
    walls = {"network": False, "processes": False, "signals": False, "files": False, "root": False}
    hello = {"namespaces": "own", "landlock": 7, "seccomp": True, "uid": 5, "missing": []}
    nothing = {**walls, "library": True, "write": True}

    def name(hello: dict[str, object], **possible: bool) -> str:
        return levels.measured({**hello, "possible": {**nothing, **possible}}, ()).name

    assert name(hello) == "namespaces"
    assert name({**hello, "namespaces": "none"}) == "files"
    assert name({**hello, "landlock": 0}) == "files"
    assert name(hello, files=True) == "syscalls"
    assert name({**hello, "seccomp": False}) == "limits"
    for hole in ("network", "processes", "signals", "root"):
        assert name(hello, **{hole: True}) == "limits"
    account = levels.measured(
        {**hello, "possible": {**nothing, "files": True}}, ("bubblewrap: not installed",)
    ).account()
    assert "can reach: files" in account
    assert "bubblewrap: not installed" in account


def test_tasks_without_tests_are_refused(judge: Judge) -> None:
    """A task whose tests had been lost paid every program."""
    for tests in (AssertTests("f", ()), StdinTests(()), CallTests("f", ())):
        with pytest.raises(UserError, match="no tests"):
            judge.submit(Submission("", tests, name="t1"))


def test_bad_data_of_one_task_leaves_the_others_alone(judge: Judge) -> None:
    """An expected value that cannot be sent ended the worker's thread, and everything waited for ever."""
    bad = Submission("def f(x): return x", CallTests("f", (CallCase((1,), lambda: 0),)))
    verdicts = judge.judge([bad, RIGHT])
    assert verdicts[0].outcome is Outcome.LOST
    assert verdicts[1].ok


def test_submit_blocks_while_too_many_wait() -> None:
    """A producer ran ahead of the judge and filled the memory with programs."""
    with Judge(JudgeConfig(workers=1, max_pending=2)) as judge:
        done = threading.Event()

        def produce() -> None:
            for _ in range(6):
                try:
                    judge.submit(SLOW)
                except RuntimeError:
                    return
            done.set()

        thread = threading.Thread(target=produce)
        thread.start()
        assert not done.wait(1.0)
        judge.close()
        thread.join(10)
        assert not thread.is_alive()


def test_close_leaves_nothing_and_settles_everything() -> None:
    """Processes of a closed judge ran on, and futures that nobody would ever set were waited for."""
    before = {child.pid for child in children()}
    descriptors = len(os.listdir("/proc/self/fd"))
    judge = Judge(JudgeConfig(workers=2))
    futures = [judge.submit(SLOW) for _ in range(5)]
    time.sleep(0.3)
    judge.close()
    judge.close()
    assert [future.result(timeout=5).outcome for future in futures] == [Outcome.LOST] * 5
    assert not new_children(before)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(RuntimeError, match="closed"):
        judge.submit(RIGHT)


def test_a_sandbox_that_dies_is_replaced_and_the_program_judged_again() -> None:
    """The machinery's own failure was a reward of 0, or stopped the worker."""
    before = {child.pid for child in children()}
    with Judge(JudgeConfig(workers=1, retries=2)) as judge:
        waiting = judge.submit(
            Submission("import time\ndef f(x):\n    time.sleep(2)\n    return x", RIGHT.tests, Limits(wall_s=30))
        )
        time.sleep(0.5)
        kill_all(before)
        assert waiting.result(timeout=60).ok
        assert judge.judge([WRONG])[0].outcome is Outcome.WRONG


def test_after_the_retries_a_program_is_lost_not_failed() -> None:
    """A broken machine taught the model that its programs were wrong."""
    before = {child.pid for child in children()}
    stop = threading.Event()
    with Judge(JudgeConfig(workers=1, retries=1)) as judge:

        def kill() -> None:
            while not stop.wait(0.2):
                kill_all(before)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            result = judge.submit(SLOW).result(timeout=60)
        finally:
            stop.set()
            killer.join()
        assert (result.outcome, result.ok) == (Outcome.LOST, False)
        assert result.message
        assert judge.judge([RIGHT])[0].ok


def test_sandboxes_are_replaced_after_their_time() -> None:
    """What leaks in one sandbox would grow for the length of a run."""
    before = {child.pid for child in children()}
    with Judge(JudgeConfig(workers=1, jobs_per_sandbox=3)) as judge:
        first = {child.pid for child in new_children(before)}
        assert all(v.ok for v in judge.judge([RIGHT] * 8))
        assert not first & {child.pid for child in new_children(before)}


@pytest.mark.parametrize("way", ["own", "bubblewrap", "none"])
def test_nothing_outlives_a_trainer_that_is_killed(way: str) -> None:
    """Sandboxes of a killed job kept their cores; bubblewrap may not signal what has become another user."""
    if way == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    code = (
        "import sys, time\nfrom ra3_megatron.reward.judge import Judge\n"
        "from ra3_megatron.config.judge import JudgeConfig\n"
        "from tests.unit.reward.test_judge import SLOW, children\n"
        f"judge = Judge(JudgeConfig(workers=1, namespaces={way!r}))\n"
        "judge.submit(SLOW)\ntime.sleep(0.5)\nprint(*[c.pid for c in children()], flush=True)\ntime.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) >= 2
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]


MIXED = [
    RIGHT,
    WRONG,
    Submission("def f(x):\n    while True: pass", RIGHT.tests, Limits(cpu_s=0.5)),
    Submission("import os\ndef f(x): os._exit(0)", RIGHT.tests),
    Submission("print(sorted({'a', 'b', 'c'}), hash('a') % 1000)", StdinTests((StdinCase("", "1"),))),
    Submission("print(list({'a', 'b', 'c', 'd'}))", StdinTests((StdinCase("", "x"),))),
    Submission("def f(x): return [0] * 10**6", RIGHT.tests),
    Submission("def f(a): return a + 1", CallTests("f", (CallCase((1,), 2), CallCase((2,), 4)))),
]


def test_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    """With eight workers on two cores, programs met a wall-clock limit that one worker did not know."""
    said = []
    for workers in (1, 8):
        with Judge(JudgeConfig(workers=workers)) as judge:
            verdicts = judge.judge(MIXED * 2)
        said.append([(v.outcome, v.passed, v.message) for v in verdicts])
    assert said[0] == said[1]
    assert said[0][: len(MIXED)] == said[0][len(MIXED) :]
