"""RLVR from the command a user types: killed at any moment, on several processes, with bad tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ra3_megatron.report.schema import curve, read_metrics
from tests.e2e import rl, small
from tests.e2e.forked import ForkServer
from tests.e2e.small import all_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rlvr")
    rl.write_tasks(folder / "tasks.jsonl")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, base: Path, server: ForkServer) -> Path:
    """A run that nobody disturbed."""
    (done,) = server.cli(["rlvr", str(rl.write_config(folder, base, "whole"))])
    assert done.code == 0, done.err[-3000:]
    return folder / "whole" / rl.STAGE


def result(stage: Path) -> dict[str, Any]:
    found = json.loads((stage / "DONE").read_text())
    found.pop("seconds")
    return found


def tensors(stage: Path) -> dict[str, torch.Tensor]:
    return all_tensors(stage.parent / result(stage)["checkpoint"] / "dist")


def test_the_run_does_what_it_says(whole: Path) -> None:
    """Answers that were judged and never learned from, groups refilled without a bound, a stage without its figures."""
    records = read_metrics(whole / "metrics.jsonl")
    steps = [r for r in records if "pass_rate" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["lag"] for r in steps] == [0, 1, 0, 1, 0, 1]
    assert [r["step"] for r in records if "validation_pass_rate" in r] == [0, 3, 6]
    assert all(4 <= r["groups"] <= 8 for r in steps), "one refill at most"
    assert sum(r["groups_used"] for r in steps) > 6
    assert any(r["grad_norm"] > 0 for r in steps)
    assert any(0 < r["pass_rate"] < 1 for r in steps)
    assert all(r["rollout_gap"] < 1e-4 for r in steps if r["lag"] == 0)
    for r in steps:
        verdicts = sum(v for k, v in r.items() if k.startswith("verdict_"))
        assert verdicts == r["answers"] == 4 * r["groups"]
    found = result(whole)
    assert found["samples"] == sum(r["answers"] for r in steps)
    assert found["pass_rate_before"] == records[0]["validation_pass_rate"]
    shown = json.loads((whole / "data" / "samples" / "step_00000001.json").read_text())["groups"]
    assert shown[0]["prompt"].endswith("return x  #")
    assert len(shown[0]["answers"]) == 4
    page = (whole.parent / "report.html").read_text()
    assert "Pass rate" in page
    assert "return x  #" in page


def test_kills_change_nothing(folder: Path, base: Path, whole: Path, server: ForkServer) -> None:
    """Answers drawn twice, verdicts of another attempt, tasks skipped or seen twice after a crash."""
    config = rl.write_config(folder, base, "killed")
    stage = folder / "killed" / rl.STAGE
    moments = (
        ("data/validation/*.answers", 0),  # in or after the first measurement
        ("data/answers/*.answers", 0),  # in the first draw
        ("checkpoints/step_00000002.partial", 0),  # in a save
        ("checkpoints/step_00000002", 500),  # between draws, and the last write was torn
        ("checkpoints/step_00000004", 1),
        ("data/samples/step_00000006.json", 0),  # after the last update, before its checkpoint
        ("checkpoints/step_00000006", 0),  # before DONE
    )
    killed = 0
    for moment, torn in moments:
        if next(stage.glob(moment), None) is not None:
            continue  # the last attempt lived a little longer, and came past this one
        (ended,) = server.cli(["rlvr", str(config)], kill_when=(stage, moment))
        assert ended.code in (0, -9), ended.err[-3000:]
        killed += ended.code == -9
        for ledger in stage.glob("data/answers/*.answers"):
            if torn and not (stage / "DONE").exists():
                content = ledger.read_bytes()
                ledger.write_bytes(content[: max(0, len(content) - torn)])
    assert killed >= 4, "the run ended before it was killed often enough"
    (done,) = server.cli(["rlvr", str(config)])
    assert done.code == 0, done.err[-3000:]
    assert result(stage) == result(whole)
    assert curve(stage / "metrics.jsonl") == curve(whole / "metrics.jsonl")
    for place in ("answers", "validation", "samples"):
        names = sorted(p.name for p in (whole / "data" / place).iterdir())
        assert names == sorted(p.name for p in (stage / "data" / place).iterdir())
        for name in names:
            assert (stage / "data" / place / name).read_bytes() == (whole / "data" / place / name).read_bytes(), name
    a, b = tensors(stage), tensors(whole)
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


PROBLEMS = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f"def f{n}(x):\n    return x + {n}  #",
        "entry_point": f"f{n}",
        "canonical_solution": "\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(2)
]
"""Passed by an answer that stays in the comment."""


def test_midtraining_goes_on_into_rlvr(folder: Path, tmp_path: Path, server: ForkServer) -> None:
    """RLVR of an arm began from the base, the exported model was that of before, or benchmarks met one model twice."""
    rlvr = {"start": None, "tasks": str(folder / "tasks.jsonl"), "steps": 1, "max_lag": 0, "eval_interval": 0}
    (tmp_path / "HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    evaluation = {"benchmarks": ["humaneval"], "data_dir": str(tmp_path), "start_token": "auto", "max_tokens": 12}
    path = rl.write_config(tmp_path, tmp_path, rlvr=rlvr, evaluation=evaluation, train={"steps": 3, "eval_interval": 0})
    plain = yaml.safe_load(path.read_text())
    plain["model"]["architecture"] = small.config(tmp_path)["model"]["architecture"]
    path.write_text(yaml.safe_dump(plain))
    (done,) = server.cli(["midtrain", str(path)])
    assert done.code == 0, done.err[-3000:]
    stages = {
        p.name: json.loads((p / "DONE").read_text()) for p in (tmp_path / "run").iterdir() if (p / "DONE").exists()
    }
    assert set(stages) == {"00-prepare", "01-tasks", "02-ntp", "03-ntp-rlvr", "04-export", "05-evaluate"}
    assert stages["04-export"]["checkpoint"] == stages["03-ntp-rlvr"]["checkpoint"]
    assert stages["03-ntp-rlvr"]["parameters_sha256"] != stages["02-ntp"]["parameters_sha256"]
    found = json.loads((tmp_path / "run" / "05-evaluate" / "results.json").read_text())["models"]
    weights = {name: model["parameters_sha256"] for name, model in found.items()}
    assert weights == {
        arm: stages[stage]["parameters_sha256"] for arm, stage in (("ntp", "02-ntp"), ("ntp-rlvr", "03-ntp-rlvr"))
    }
    assert all(model["benchmarks"]["humaneval"]["answers"] == len(PROBLEMS) for model in found.values())
    (alone,) = server.cli(["midtrain", str(path), "--stage", "rlvr", "--arm", "ntp"])
    assert alone.code == 0, alone.err[-3000:]


SHORT = {"steps": 2, "eval_interval": 0, "kl_coefficient": 0.05, "correction": "decoupled", "aggregation": "constant"}


@pytest.fixture(scope="module")
def short(folder: Path, base: Path, server: ForkServer) -> Path:
    (done,) = server.cli(["rlvr", str(rl.write_config(folder, base, "short", rlvr=SHORT))])
    assert done.code == 0, done.err[-3000:]
    return folder / "short" / rl.STAGE


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("dp2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        ("tp2", {"tensor": 2, "sequence": True}),
        ("pp2", {"pipeline": 2}),
    ],
)
def test_two_processes_learn_what_one_learns(
    name: str, parallel: dict[str, Any], folder: Path, base: Path, short: Path, server: ForkServer
) -> None:
    """Divisors of one replica, refills that depend on the layout, a reward that reached one process alone."""
    config = rl.write_config(folder, base, name, rlvr=SHORT, parallel=parallel)
    ended = server.cli(["rlvr", str(config)], world=2)
    assert [e.code for e in ended] == [0, 0], ended[0].err[-3000:] + ended[1].err[-3000:]
    stage = folder / name / rl.STAGE
    for a, b in zip(curve(stage / "metrics.jsonl"), curve(short / "metrics.jsonl"), strict=True):
        # The gap is rounding itself; a ratio at the edge of the clip falls to either side.
        for figure in a.keys() - {"rollout_gap", "rollout_tokens", "forward_passes", "clipped"}:
            assert a[figure] == pytest.approx(b[figure], rel=2e-3, abs=2e-4, nan_ok=True), (a["step"], figure)
    mine, theirs = tensors(stage), tensors(short)
    weights = {k: v for k, v in theirs.items() if not k.startswith("optimizer") and v.is_floating_point() and v.dim()}
    assert len(weights) > 8
    for key, expected in weights.items():
        rows = min(len(expected), len(mine[key]))  # padding of the vocabulary differs
        difference = (mine[key][:rows] - expected[:rows]).abs().max() / expected.abs().max()
        assert difference < 2e-3, key


def refused(server: ForkServer, config: Path, *overrides: str) -> str:
    (ended,) = server.cli(["rlvr", str(config), *overrides])
    assert ended.code == 2, ended.out[-2000:] + ended.err[-2000:]
    assert not list(Path(config).parent.glob(f"{Path(config).stem}/{rl.STAGE}/checkpoints/*"))
    return ended.err


GOOD: dict[str, Any] = {"id": "a", "prompt": "p", "entry_point": "f", "tests": ["assert f(1) == 1"]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"id": "a"'], "line 1 is not JSON"),
        ([json.dumps({**GOOD, "prompt": None})], "prompt"),
        ([json.dumps(GOOD), json.dumps(GOOD)], "'a' was at"),
        ([json.dumps({**GOOD, "tests": []})], "tests"),
        ([json.dumps({**GOOD, "prompt": "long " * 200})], "without room"),
        ([json.dumps({**GOOD, "solution": "def f(x):\n    return 2\n"})], "fail on the task's own reference"),
    ],
    ids=["malformed", "field", "double", "no tests", "long", "reference"],
)
def test_bad_tasks_are_refused(rows: list[str], said: str, base: Path, tmp_path: Path, server: ForkServer) -> None:
    """A bad file of tasks was found out after hours, or never: the policy learned from tests that nothing passes."""
    (tmp_path / "tasks.jsonl").write_text("\n".join(rows) + "\n")
    config = rl.write_config(tmp_path, base, rlvr={"unfit_tasks": "error", "validation_tasks": 0})
    assert said in refused(server, config)


def test_other_refusals(folder: Path, base: Path, whole: Path, tmp_path: Path, server: ForkServer) -> None:
    """Nothing to start from, an arm that is not there, tasks changed under a run, no room for a prompt."""
    config = rl.write_config(folder, base, "none", rlvr={"start": None})
    assert "name a base model" in refused(server, config)
    config = rl.write_config(folder, base, "none", rlvr={"start": str(tmp_path)})
    assert "neither a finished checkpoint nor a run" in refused(server, config)
    config = rl.write_config(folder, base, "none", rlvr={"start_arm": "ra3"})
    assert "start_arm" in refused(server, config)
    config = rl.write_config(folder, base, "none")
    assert "rlvr.steps is 0" in refused(server, config, "rlvr.steps=0")
    assert "multiple of" in refused(server, config, "rlvr.prompts_per_step=3", "rlvr.minibatches=3", "parallel.data=1",
                                    "rlvr.prompts_per_step=5")  # fmt: skip
    assert "no room for a prompt" in refused(server, config, "rlvr.max_tokens=128")


def test_other_tasks_on_resume_are_refused(base: Path, tmp_path: Path, server: ForkServer) -> None:
    """A task file that was changed between attempts: another order, other tests, the same counters."""
    rl.write_tasks(tmp_path / "tasks.jsonl")
    config = rl.write_config(tmp_path, base, rlvr={"steps": 2})
    (done,) = server.cli(["rlvr", str(config), "--stage", "tasks"])
    assert done.code == 0, done.err[-3000:]
    rl.write_tasks(tmp_path / "tasks.jsonl", prompt="another")
    assert "holds other tasks" in refused(server, config)


def test_unfit_tasks_are_dropped_and_counted(base: Path, tmp_path: Path, server: ForkServer) -> None:
    """A task whose tests fail on its own reference is no reason to stop, and must not stay either."""
    good = rl.write_tasks(tmp_path / "tasks.jsonl").read_text().splitlines()
    bad = [json.dumps({**json.loads(good[0]), "id": "bad", "solution": "def f(x):\n    return 2\n"})]
    long = [json.dumps({**json.loads(good[0]), "id": "long", "prompt": "long " * 200})]
    (tmp_path / "tasks.jsonl").write_text("\n".join([*good, *bad, *long]) + "\n")
    config = rl.write_config(tmp_path, base)
    (done,) = server.cli(["rlvr", str(config), "--stage", "tasks"])
    assert done.code == 0, done.err[-3000:]
    found = json.loads((tmp_path / "run" / "00-tasks" / "DONE").read_text())
    assert (found["read"], found["train"], found["validation"]) == (14, 8, 4)
    assert sum(found["dropped"].values()) == 2
    fates = json.loads((tmp_path / "run" / "00-tasks" / "data" / "tasks.json").read_text())["dropped"]
    assert set(fates) == {"bad", "long"}
    (status,) = server.cli(["rlvr", str(config), "--status"])
    assert "00-tasks" in status.out
    assert "01-rlvr" in status.out
    (dry,) = server.cli(["rlvr", str(config), "--dry-run"])
    assert "6 steps x 4 tasks x 4 answers" in " ".join(dry.out.split())
