"""`benchmarks/gpu_all.py`: parts that hang or fail, results on disk as they come, a machine with a folder of wheels."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_all() -> ModuleType:
    """The script as a module; it needs the standard library alone."""
    spec = importlib.util.spec_from_file_location("gpu_all", ROOT / "benchmarks" / "gpu_all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_all"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_all"]


def row(case: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {"part": "p", "case": case, "value": value, "unit": "x", "target": "", "met": None, "note": "", **more}


def part(module: ModuleType, name: str, code: str, writes: bool = True) -> Any:
    """A part that runs `code`, in which `results` is the path it is given."""
    head = "import sys, json, time, subprocess; from pathlib import Path; results = Path(sys.argv[-1]);"
    return module.Part(name, "a test", 60.0, ("-c", head + code), writes=writes)


def test_a_part_that_hangs_loses_only_what_it_did_not_know_yet(gpu_all: ModuleType, tmp_path: Path) -> None:
    """Its children held the device's memory, and the next part had none."""
    code = (
        f"results.write_text(json.dumps([{row('known', 2.0)!r}]));"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']);"
        f"Path({str(tmp_path / 'child')!r}).write_text(str(child.pid)); time.sleep(100)"
    )
    one = part(gpu_all, "smoke", code)
    outcome = gpu_all.run(one, 8.0, tmp_path, dict(os.environ), False)
    assert outcome.state == "stopped after 8 s"
    assert [r["case"] for r in gpu_all.rows_of(one, tmp_path)] == ["known"]
    number = int((tmp_path / "child").read_text())
    for _ in range(100):
        alive = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True, check=False)
        if not alive.stdout.strip() or alive.stdout.startswith("Z"):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of a stopped part lives on")


def test_failures_are_told_from_success(gpu_all: ModuleType, tmp_path: Path) -> None:
    """A benchmark that wrote FAILED for every case ended with exit code 0 and looked fine."""
    env = dict(os.environ)
    dies = part(gpu_all, "a", "print('the reason'); sys.exit(3)")
    assert gpu_all.run(dies, 30, tmp_path, env, False).state == "failed (exit code 3)"
    failed = [row("bad", None, note="FAILED: OutOfMemoryError"), row("good", 1.0)]
    half = part(gpu_all, "b", f"results.write_text(json.dumps({failed!r}))")
    assert gpu_all.run(half, 30, tmp_path, env, False).state == "some cases failed"
    text = part(gpu_all, "c", "print('batch 8: 12 us a pass')", writes=False)
    assert gpu_all.run(text, 30, tmp_path, env, False).state == "ok"
    assert [r["case"] for r in gpu_all.rows_of(text, tmp_path)] == ["batch 8: 12 us a pass"]
    skipped = dataclasses.replace(
        part(gpu_all, "d", "print('=== 3 skipped in 1 s ===')", writes=False), proof=" passed"
    )
    assert gpu_all.run(skipped, 30, tmp_path, env, False).state == "NOT RUN: 3 skipped in 1 s"


def test_results_are_a_table_and_are_kept_for_the_next_call(gpu_all: ModuleType, tmp_path: Path) -> None:
    """A second call for the parts that had no time wrote over the first one's figures."""
    rows = [row("a|b", 0.61, target=">= 0.5", met=True), row("c", 2.0, met=False, target=">= 3", note="why"),
            row("d", None, note="NOT RUN: no chip")]  # fmt: skip
    (tmp_path / "smoke.json").write_text(json.dumps(rows))
    outcomes = {"smoke": gpu_all.Outcome("ok", 12.0), "training": gpu_all.Outcome("NOT RUN: no time left")}
    gpu_all.write(tmp_path, outcomes, "a chip")
    text = (tmp_path / "results.md").read_text()
    assert "| a\\|b | 0.61 x | >= 0.5 | met |" in text
    assert "| c (why) | 2 x | >= 3 | **missed** |" in text
    assert "- d: NOT RUN: no chip" in text
    assert "NOT RUN: no time left" in text
    assert gpu_all.earlier(tmp_path, "a chip") == outcomes
    assert gpu_all.earlier(tmp_path, "another chip") == {}
    assert not list(tmp_path.glob(".*.tmp"))


def test_wheels_are_seen_by_the_parts_alone(gpu_all: ModuleType, tmp_path: Path) -> None:
    """Wheels that were installed into the machine's own Python stayed there."""
    wheel = tmp_path / "wheels" / "made_up-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up.py", "value = 7\n")
        info = "made_up-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    target = tmp_path / "target"
    gpu_all.install(wheel.parent, target)
    env = gpu_all.environment(target)
    assert env["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(target)]
    command = [sys.executable, "-c", "import made_up; print(made_up.value)"]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "7\n"
    with pytest.raises(SystemExit, match=r"no \*\.whl"):
        gpu_all.install(target, tmp_path / "other")


def test_parts_are_scripts_that_are_there(gpu_all: ModuleType) -> None:
    """A benchmark that was renamed was found missing on the GPU machine."""
    for one in gpu_all.PARTS:
        place = Path(one.command[0] if one.command[0] != "-m" else one.command[-1])
        assert place.exists(), one.name
    assert [p.name for p in gpu_all.chosen_parts("memory, smoke")] == ["smoke", "memory"]
    with pytest.raises(SystemExit, match="none of"):
        gpu_all.chosen_parts("nothing")
    assert sum(p.limit for p in gpu_all.PARTS[:3]) < 570
