"""`ra3 doctor`: what counts as a problem, and self-tests that end."""

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from ra3_megatron.model.optional import OptionalPackage
from ra3_megatron.stages import doctor
from ra3_megatron.stages.doctor import Ability, Check, Examination

NO_TE = OptionalPackage(False, None, "transformer-engine is not installed")
TE = OptionalPackage(True, "2.20.2", "")
H200 = ["NVIDIA H200, 140 GiB, sm_90"]


def state(name: str, checks: dict[str, str]) -> list[Check]:
    return [Check(n, s, "x") for n, s in {"gloo": "ok", "NCCL": "ok", name: "ok", **checks}.items()]  # type: ignore[arg-type]


def works(abilities: list[Ability]) -> dict[str, bool]:
    return {a.name.split(" (")[0]: a.works for a in abilities}


def test_two_processes_reach_each_other() -> None:
    """The self-test said ok without any message having passed."""
    check = doctor.gloo_check()
    assert check.state == "ok", check.found
    assert "2 process" in check.found


def test_self_test_that_fails_is_a_problem_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken gloo was only a note, and training hung later."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    check = doctor.gloo_check()
    assert check.state == "problem"
    assert "exit code 1" in check.found


def test_deadline_ends_what_hangs(tmp_path: Path) -> None:
    """A self-test that hung took the doctor with it and left a process behind."""
    mark = tmp_path / "alive"
    hang = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    started = time.monotonic()
    failure = doctor.run_together([[sys.executable, "-c", hang], [sys.executable, "-c", "pass"]], deadline_s=2)
    assert failure == "no answer within 2 s"
    assert time.monotonic() - started < 20
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists()


def test_first_failure_ends_the_others() -> None:
    """One process died and the doctor waited for the other until the deadline."""
    dies = [sys.executable, "-c", "import sys; print('first line'); sys.exit('the reason')"]
    hangs = [sys.executable, "-c", "import time; time.sleep(100)"]
    started = time.monotonic()
    assert doctor.run_together([hangs, dies], deadline_s=60) == "exit code 1: the reason"
    assert time.monotonic() - started < 30


def test_wrong_apex_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's apex broke megatron-core's norms with an error about LayerNorm."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        check = doctor.apex_check()
    finally:
        # Looking for its submodule imports the package: later tests must not find it.
        sys.modules.pop("apex", None)
    assert check.state == "problem"
    assert "pip uninstall apex" in check.cure


def test_full_disk_and_read_only_folder(tmp_path: Path) -> None:
    """The first checkpoint of a run failed for lack of space nobody had looked for."""
    assert doctor.disk_check(tmp_path, doctor.MIN_DISK - 1).state == "problem"
    assert doctor.disk_check(tmp_path, doctor.MIN_DISK).state == "ok"
    assert doctor.disk_check(tmp_path / "missing", doctor.MIN_DISK).state == "problem"


def test_small_shared_memory_names_the_option(tmp_path: Path) -> None:
    """NCCL died in a container with 64 MB of shared memory."""
    assert doctor.shm_check(True, tmp_path / "missing").state == "note"


@pytest.mark.parametrize(
    ("checks", "te", "devices", "expected"),
    [
        ({}, NO_TE, [], {"train on this CPU": True, "train on a GPU in bf16": False, "fp8": False}),
        ({}, TE, H200, {"train on this CPU": True, "train on a GPU in bf16": True, "fp8": True}),
        ({}, TE, ["NVIDIA A100, 80 GiB, sm_80"], {"train on a GPU in bf16": True, "fp8": False}),
        ({}, NO_TE, H200, {"train on a GPU in bf16": True, "fp8": False}),
        ({"NCCL": "note"}, TE, H200, {"train on this CPU": True, "train on a GPU in bf16": False}),
        ({"gloo": "problem"}, NO_TE, [], {"train on this CPU": True, "several processes on this CPU": False}),
        ({"apex": "problem"}, NO_TE, [], {"train on this CPU": False, "several processes on this CPU": False}),
    ],
)
def test_what_follows_from_the_findings(
    checks: dict[str, str], te: OptionalPackage, devices: list[str], expected: dict[str, bool]
) -> None:
    """FP8 was promised on an A100, and on an H200 without Transformer Engine."""
    found = works(doctor.abilities(state("apex", checks), te, devices))
    assert {name: found[name] for name in expected} == expected


def test_only_problems_make_the_doctor_unhappy() -> None:
    """A laptop was declared broken for want of a GPU."""
    assert Examination([Check("a", "ok", ""), Check("b", "note", "")], []).healthy
    assert not Examination([Check("a", "ok", ""), Check("b", "problem", "")], []).healthy


def test_tables_show_extras_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ra3-megatron[te]` lost its brackets, since the table took them for a style."""
    examination = Examination([Check("TE", "note", "none", "pip install 'ra3-megatron[te]'")], [])
    monkeypatch.setattr(doctor, "examine", lambda: examination)
    out = io.StringIO()
    assert doctor.run_doctor(Console(file=out, width=160)) is True
    assert "pip install 'ra3-megatron[te]'" in out.getvalue()
