"""The walls, in every way a sandbox can be built here, as this user and, for root, as an ordinary one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.guest.remove import empty
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import AssertTests, InProcessTests, Limits, StdinCase, StdinTests, Submission
from ra3_megatron.reward.sandbox.pool import LocalPool
from tests.unit.reward.ordinary import ROOT, as_nobody

WAYS = ("own", "bubblewrap", "none")
USERS = ("this", "nobody")

TRIES = {
    "open a host file": "open('/etc/passwd')",
    "list the host's root": "[x for x in __import__('os').listdir('/') if x == 'home'][0]",
    "read another's environment": "open('/proc/%d/environ' % __import__('os').getppid())",
    "write outside": "open('/tmp/ra3-left', 'w')",
    "write beside": "open('../ra3-left', 'w')",
    "open a socket": "__import__('socket').socket()",
    "fork": "__import__('os').fork()",
    "run a program": "__import__('os').execv('/bin/sh', ['sh'])",
    "signal the parent": "__import__('os').kill(__import__('os').getppid(), 9)",
    "signal all": "__import__('os').kill(-1, 9)",
    "become root": "__import__('os').setuid(0)",
    "raise a limit": "__import__('resource').setrlimit(7, (9999, 9999))",
    "leave the group": "__import__('os').setsid()",
    "make a device": "__import__('os').mknod('x', 0o20666, 259)",
    "see descriptors of others": "[f for f in range(5, 64) if not __import__('os').fstat(f)][0]",
}
"""Each must raise in a jailed program."""
PROGRAM = """
import json
found = {}
for name, code in json.loads(open(0).read()).items():
    try:
        eval(code)
    except BaseException as error:
        found[name] = type(error).__name__
    else:
        found[name] = "possible"
print(json.dumps(found))
"""
REPORT = """
import json, sys
from ra3_megatron.config.errors import UserError
from tests.unit.reward.test_sandbox import survey
try:
    print(json.dumps(survey(sys.argv[1])))
except UserError as error:
    print(json.dumps({"refused": str(error)}))
"""


def attempt(judge: Judge, tries: dict[str, str]) -> dict[str, str]:
    """What a program says about `tries`: its output comes back as the difference from what is expected."""
    program = PROGRAM.replace("print(json.dumps(found))", "raise SystemExit(json.dumps(found))")
    verdict = judge.judge([Submission(program, StdinTests((StdinCase(json.dumps(tries), "-"),)))])[0]
    return json.loads(verdict.message[verdict.message.index("{") :])


def survey(way: str) -> dict[str, Any]:
    """Level and outcome of every try, one program each, so that one that ends the process hides no other."""
    with Judge(JudgeConfig(workers=1, namespaces=way)) as judge:  # type: ignore[arg-type]
        found: dict[str, str] = {}
        for name, code in TRIES.items():
            found |= attempt(judge, {name: code})
        right = judge.judge([Submission("def f(x): return x", AssertTests("f", ("assert f(1) == 1",)))])[0]
        assert isinstance(judge._backend, LocalPool)
        return {"level": judge.level, "account": judge._backend.account.account(), "found": found, "ok": right.ok}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("user", USERS)
def test_walls(user: str, way: str, tmp_path: Path) -> None:
    """Each way and each user has its own gaps: root ignores limits and modes, others cannot change their user."""
    command, environment = [sys.executable, "-c", REPORT, way], {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if user == "nobody":
        built = as_nobody(command, tmp_path)
        if isinstance(built, str):
            pytest.skip(built)
        command, environment = built
        environment = {**environment, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    if "refused" in result:
        assert way in result["refused"]
        pytest.skip(result["refused"][:300])
    assert result["ok"]
    possible = {name for name, how in result["found"].items() if how == "possible"}
    if "may not read" in result["account"] or result["level"] not in ("files", "namespaces"):
        assert result["level"] in ("limits", "syscalls")
        pytest.skip(f"this machine has less to offer: {result['account'][:300]}")
    assert not possible, result["account"]


def test_an_unknown_way_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bubblewrap the judge fell back to something weaker than what was asked for."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="bwrap is not installed"):
        Judge(JudgeConfig(workers=1, namespaces="bubblewrap"))


LEAVE = """
import os
for i in range(200): open(f'file{i}', 'w').write('x')
os.mkdir('closed'); open('closed/inner', 'w').write('x'); os.chmod('closed', 0)
os.symlink('/etc', 'link'); os.symlink('nowhere', 'broken')
for i in range(1500): os.mkdir('d'); os.chdir('d')
os.chdir(os.environ['HOME']); os.chmod('.', 0)
import sys; sys.modules['math'] = None
import builtins; builtins.sum = lambda x: 0
"""
LOOK = """
import math, os
assert sum([1]) == 1 and math.pi > 3
assert os.listdir('.') == [], os.listdir('.')
assert os.access('.', os.W_OK)
"""


@pytest.mark.parametrize("way", ["own", "none"])
def test_the_next_program_finds_nothing_of_the_last(way: str) -> None:
    """Files, nested folders and changed modules of one program met the next; rmtree broke on depth."""
    with Judge(JudgeConfig(workers=1, namespaces=way), allow_unsafe=True) as judge:  # type: ignore[arg-type]
        for _ in range(2):
            left, looked = judge.judge([Submission("", InProcessTests(p, wall_s=30)) for p in (LEAVE, LOOK)])
            assert left.ok, left
            assert looked.ok, looked


def test_what_a_program_left_is_removed_with_the_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A work folder stayed in /tmp when the judge was closed while a program ran."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Judge(JudgeConfig(workers=1, namespaces="none")) as judge:
        program = "open('x', 'w').write('x')\nimport os, time\nos.mkdir('y')\nos.chmod('y', 0)\ntime.sleep(60)"
        future = judge.submit(Submission(program, StdinTests((StdinCase("", ""),)), Limits(wall_s=50)))
        for _ in range(100):
            if list(tmp_path.rglob("y")):
                break
            import time

            time.sleep(0.1)
        assert list(tmp_path.iterdir())
        judge.close()
        assert future.result().outcome == "lost"
    assert not list(tmp_path.iterdir())


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    """A link to a folder outside took that folder's files with it."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (inside / "a" / "b").mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    (inside / "a" / "b" / "link").symlink_to(outside)
    (inside / "a" / ".lifted-1-1").write_text("x")
    os.chmod(inside / "a", 0)
    empty(str(inside))
    assert list(inside.iterdir()) == []
    assert (outside / "kept").read_text() == "x"


def test_memory_and_files_are_limited(judge: Judge) -> None:
    """A program wrote until the disk was full, or opened files until the sandbox had none."""
    for program in (
        "with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))",
        "files = [open('/dev/null') for _ in range(1000)]",
        "import threading, time\nfor _ in range(5000):\n"
        "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    ):
        verdict = judge.judge([Submission("", InProcessTests(program, wall_s=30), Limits(cpu_s=8, wall_s=30))])[0]
        assert verdict.outcome in ("exception", "crashed", "memory"), verdict


def test_the_environment_is_empty(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """API keys of the trainer's environment could be read by programs."""
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "abc")
    with Judge(JudgeConfig(workers=1), allow_unsafe=True) as fresh:
        program = "import os, sys\nassert 'SECRET_OF_THE_TRAINER' not in os.environ\nassert sys.argv == ['main.py']"
        assert fresh.judge([Submission("", InProcessTests(program))])[0].ok


def test_expected_values_are_not_in_the_programs_memory(judge: Judge) -> None:
    """Forked off a process that held the tests, a program could find the answers with gc or by reading memory."""
    needle = "NEEDLE-" + "0123456789abcdef"
    program = "import gc, sys\ndef f(x):\n    mark = 'NEED' + 'LE-0'\n    with open('/proc/self/maps') as maps: pass\n"
    finder = (
        "import gc\ndef f(x):\n    seen = []\n"
        "    for o in gc.get_objects():\n"
        "        for part in (o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()):\n"
        "            if isinstance(part, (str, bytes)) and part[:4] in ('NEED', b'NEED'): seen.append(part)\n"
        "    return seen[0] if seen else None"
    )
    for text in (program, finder):
        tests = AssertTests("f", (f"assert f(1) == {needle!r}",))
        assert not judge.judge([Submission(text, tests)] * 3)[-1].ok
