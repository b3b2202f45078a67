"""The command line as a user types it: exit codes, one-line errors, silence of other ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ra3_megatron import cli
from ra3_megatron.config.errors import UserError

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID")


def environment(**extra: str) -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    return {**plain, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **extra}


def ra3(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ra3_megatron", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**extra),
        check=False,
    )


def rank_of(number: int) -> dict[str, str]:
    """torchrun's variables for one of four processes."""
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    return {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_help_comes_at_once_and_without_torch() -> None:
    """`--help` took the seconds of a torch import."""
    code = (
        "import sys, time; started = time.process_time(); from ra3_megatron.cli import main\n"
        "sys.argv = ['ra3', '--help']\n"
        "try:\n main()\n"
        "except SystemExit as end:\n"
        " heavy = {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)\n"
        " print(time.process_time() - started, end.code, sorted(heavy), file=sys.stderr)"
    )
    answers = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment(), check=True
        )
        answers.append(done.stderr.split(maxsplit=2))
        for command in ("midtrain", "convert", "doctor", "report"):
            assert command in done.stdout
    assert answers[0][1:] == ["0", "[]\n"] or answers[0][2].strip() == "[]"
    assert min(float(a[0]) for a in answers) < 0.5


def test_version() -> None:
    """The version printed was not the package's."""
    from ra3_megatron import __version__

    assert ra3("--version").stdout == f"ra3-megatron {__version__}\n"


def test_user_error_is_one_line_and_code_2(tmp_path: Path) -> None:
    """A mistyped path gave forty lines of traceback."""
    done = ra3("midtrain", str(tmp_path / "no\nsuch.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no configuration at ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("nonsense",), ("midtrain", "--nonsense", "x.yaml"), ("convert", "import", "a")])
def test_wrong_usage_is_code_2(arguments: tuple[str, ...]) -> None:
    """Wrong usage and success had the same exit code for a script."""
    done = ra3(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_other_rank_waits_then_prints_its_own_error(tmp_path: Path) -> None:
    """An error that only rank 3 had was never shown, since only rank 0 was allowed to print."""
    started = time.monotonic()
    done = ra3("report", str(tmp_path), **rank_of(3))
    assert done.returncode == 2
    assert done.stderr.startswith("error (rank 3): no run at ")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - started >= cli.GRACE_S


def test_other_rank_says_nothing_when_the_launcher_ends_it(tmp_path: Path) -> None:
    """The same mistake was printed once per process: 64 times on eight nodes."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_RANK, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**rank_of(1)),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert errors == ""


WAITING_RANK = """
import signal, sys, time
from ra3_megatron import cli

# A handler as training has it, which would let the wait go on.
signal.signal(signal.SIGTERM, lambda *_: None)
sleep = time.sleep

def announced(seconds):
    print("waiting", flush=True)
    sleep(60)

cli.time.sleep = announced
sys.argv = ["ra3", "report", sys.argv[1]]
cli.main()
"""


def test_ordinary_output_is_rank_0s(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank printed the result."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    cli.say("from the only process")
    for number in (0, 2):
        for name, value in rank_of(number).items():
            monkeypatch.setenv(name, value)
        cli.say(f"from rank {number}")
    assert capsys.readouterr().out == "from the only process\nfrom rank 0\n"


def test_broken_launcher_variables_do_not_hide_the_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Printing an error raised a second one about RANK, and the first was lost."""
    monkeypatch.setenv("RANK", "one")
    cli.report_user_error(UserError("what; found;\n  cure"))
    assert capsys.readouterr().err == "error: what; found; cure\n"


@pytest.mark.parametrize(
    ("failure", "code", "shown"),
    [
        ("RuntimeError('our own bug')", 1, "RuntimeError: our own bug"),
        ("KeyboardInterrupt()", 130, ""),
        ("UserError('three\\n lines')", 2, "error: three lines"),
    ],
)
def test_exit_codes(tmp_path: Path, failure: str, code: int, shown: str) -> None:
    """Ctrl-C looked like a crash to the job script, and a bug was shortened to one line without its place."""
    program = f"""
import sys
from ra3_megatron import cli
from ra3_megatron.config.errors import UserError
from ra3_megatron.report import run_report

def fails(run_dir):
    raise {failure}

run_report.build_report = fails
sys.argv = ["ra3", "report", "{tmp_path}"]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == code
    assert shown in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_report_command_builds_the_page(tmp_path: Path) -> None:
    """The command and the function drifted apart."""
    (tmp_path / "config.yaml").write_text("run: {arms: [ntp]}\n")
    done = ra3("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").stat().st_size > 1000
