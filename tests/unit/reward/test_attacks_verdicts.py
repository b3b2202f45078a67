"""Every attack of groups 1 to 7 through the judge, as the user of this run and, for root, as an ordinary user too."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ra3_megatron.config.judge import LEVELS
from ra3_megatron.reward.problem import Outcome
from tests.unit.reward.attacks import Case
from tests.unit.reward.battery import TOO_WEAK, all_cases
from tests.unit.reward.ordinary import NOBODY, ROOT, as_nobody

CASES = {groups: all_cases(groups) for groups in ("123456789", "7")}


@dataclass(frozen=True)
class Setting:
    """One way to run the battery."""

    name: str
    user: Literal["own", "nobody", "ordinary"]
    """`ordinary`: the user of this run, nobody when that is root."""
    namespaces: str
    groups: str


SETTINGS = (
    Setting("own user", "own", "auto", "123456789"),
    Setting("nobody", "nobody", "auto", "123456789"),
    Setting("no namespaces", "ordinary", "none", "7"),
    Setting("bubblewrap", "ordinary", "bubblewrap", "7"),
)
NEEDS = {"stat_outside": "namespaces"}
"""Attacks that a weaker level than `files` plus what is said here cannot stop: that a file exists shows without one."""
pytestmark = pytest.mark.timeout(900)
Batteries = dict[str, dict[str, Any] | str]


def start(setting: Setting, folder: Path) -> subprocess.Popen[str] | str:
    """The battery in that setting, or why there is none."""
    if setting.namespaces == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    command = [sys.executable, "-m", "tests.unit.reward.battery", str(folder / "out.json")]
    command += [setting.namespaces, setting.groups]
    environment = {**os.environ}
    if setting.user == "nobody" or (setting.user == "ordinary" and os.getuid() == 0):
        folder.chmod(0o777)
        stash = folder / "stash"
        stash.mkdir()
        built = as_nobody(command, stash)
        if isinstance(built, str):
            return built
        command, environment = built
    scratch = folder / "tmp"
    scratch.mkdir()
    scratch.chmod(0o777)
    environment |= {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True)


@pytest.fixture(scope="module")
def batteries() -> Iterator[Batteries]:
    """Results by setting, or the reason why it was not tried."""
    # Not below pytest's own folders: those are closed to other users, again and again while others run pytest.
    with tempfile.TemporaryDirectory(prefix="ra3-battery-") as root:
        Path(root).chmod(0o755)
        yield run_all(Path(root))


def run_all(root: Path) -> Batteries:
    """All settings, side by side."""
    started, folders = {}, {}
    for setting in SETTINGS:
        folder = folders[setting.name] = root / setting.name.replace(" ", "-")
        folder.mkdir()
        started[setting.name] = start(setting, folder)
    results: Batteries = {}
    try:
        for name, process in started.items():
            if isinstance(process, str):
                results[name] = process
                continue
            code = process.wait(timeout=800)
            log = (folders[name] / "log").read_text()
            assert code in (0, TOO_WEAK), f"{name}: {log[-3000:]}"
            if code == TOO_WEAK:
                results[name] = log.strip().splitlines()[-1]
                continue
            battery = results[name] = json.loads((folders[name] / "out.json").read_text())
            report(name, battery)
    finally:
        for process in started.values():
            if not isinstance(process, str):
                process.kill()
                process.wait()
    return results


def report(setting: str, battery: dict[str, Any]) -> None:
    """Print the figures: what a quiet machine shows within limit + 0.5 s is only printed on a busy one."""
    cases = {case.name: case for case in CASES["123456789"]}
    excess = {n: r["cpu_s"] - cases[n].attack.limits.cpu_s for n, r in battery["results"].items()}
    waits = {
        n: r["wall_s"] - cases[n].attack.limits.wall_s
        for n, r in battery["results"].items()
        if r["outcome"] == "wall_limit"
    }
    worst = sorted(excess, key=excess.__getitem__)[-3:]
    print(f"\n{setting}: uid {battery['uid']}, level {battery['level']}, {len(excess)} cases,"
          f" wall {battery['wall_s']:.1f} s; most processor time over the limit: "
          + ", ".join(f"{n} {excess[n]:+.2f} s" for n in worst)
          + f"; most wall time over the limit of sleepers {max(waits.values(), default=0):+.2f} s")  # fmt: skip


def of(batteries: Batteries, setting: Setting) -> dict[str, Any]:
    """The results of a setting; skips where there are none."""
    found = batteries[setting.name]
    if isinstance(found, str):
        pytest.skip(found)
    return found


every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
EVERY_CASE = [
    pytest.param(setting, case, id=f"{setting.name}-{case.name}")
    for setting in SETTINGS
    for case in CASES[setting.groups]
]


@pytest.mark.parametrize(("setting", "case"), EVERY_CASE)
def test_attack_is_not_paid(setting: Setting, case: Case, batteries: Batteries) -> None:
    """A reference evaluator, or an exit code, paid a program that had not solved the task; or the next job suffered."""
    battery = of(batteries, setting)
    needed = NEEDS.get(case.attack.name, "files")
    if LEVELS.index(battery["level"]) < LEVELS.index(needed) and case.attack.group == 7:
        pytest.skip(f"level {battery['level']} does not stop it; {needed} does")
    result = battery["results"][case.name]
    assert Outcome(result["outcome"]) in case.attack.ends, result
    assert result["control"] in (None, "passed"), result
    if case.attack.group == 6:
        # A program may reach its limit once while it is loaded and once in a call.
        assert result["cpu_s"] <= 2 * case.attack.limits.cpu_s + 0.5, result


@every_setting
def test_nothing_outside_was_touched(setting: Setting, batteries: Batteries) -> None:
    """A program reached a listener, wrote a file or ended a process of the machine that judged it."""
    battery = of(batteries, setting)
    assert battery["touched"] == []
    root = os.getuid() == 0
    assert battery["uid"] == (NOBODY if setting.user != "own" and root else os.getuid())


@every_setting
def test_nothing_is_left_behind(setting: Setting, batteries: Batteries) -> None:
    """Zombies, orphans, descriptors or folders of programs long judged filled the machine."""
    battery = of(batteries, setting)
    assert battery["zombies"] == []
    assert battery["processes"] == []
    assert battery["places"] == []
    before, after = battery["descriptors"]
    assert after <= before
