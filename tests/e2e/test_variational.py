"""The E-step killed at any moment, with torn records, and on several processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ra3_megatron.parallel.groups import initialize
from ra3_megatron.report.schema import curve
from tests.e2e import thinking
from tests.e2e.forked import ForkServer
from tests.e2e.small import all_tensors

TARGET = "tests.e2e.thinking:e_step"
LAGGING = {"variational": {"steps": 8, "max_lag": 2}}
"""Rollouts of three steps are drawn at once; checkpoints after steps 3, 6 and 8."""


def prepare_start(folder: str) -> None:
    with initialize() as parallel:
        thinking.write_start(Path(folder), parallel)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    folder = tmp_path_factory.mktemp("start")
    server.call("tests.e2e.test_variational:prepare_start", {"folder": str(folder)})
    return folder


@pytest.fixture(scope="module")
def whole(start: Path, server: ForkServer) -> Path:
    """A run that nobody disturbed."""
    run = start / "whole"
    (result,) = server.call(TARGET, {"start": str(start), "run": str(run), **LAGGING})
    assert result["step"] == 8
    return run / thinking.STAGE


def result(stage: Path) -> dict[str, Any]:
    found = json.loads((stage / "DONE").read_text())
    found.pop("seconds")
    return found


def tensors(stage: Path) -> dict[str, torch.Tensor]:
    return all_tensors(stage.parent / result(stage)["checkpoint"] / "dist")


def assert_same_run(stage: Path, whole: Path) -> None:
    """To the bit: weights and moments, curve, record of rollouts, rationales, result."""
    assert result(stage) == result(whole)
    assert repr(curve(stage / "metrics.jsonl")) == repr(curve(whole / "metrics.jsonl"))  # where nan is nan
    for name in ("rollouts/00000-of-00001.rollouts", "rationales-before.jsonl", "rationales-after.jsonl"):
        assert (stage / "data" / name).read_bytes() == (whole / "data" / name).read_bytes(), name
    a, b = tensors(stage), tensors(whole)
    assert a.keys() == b.keys()
    assert any("exp_avg_sq" in key for key in a)
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_kills_and_torn_records_change_nothing(start: Path, whole: Path, server: ForkServer) -> None:
    """Rollouts of other weights used for a step, drawn twice, or half a draw continued (slime#1761, verl#4513)."""
    run = start / "killed"
    stage = run / thinking.STAGE
    ledger = stage / "data" / "rollouts" / "00000-of-00001.rollouts"
    moments = (
        ("data/rationales-before.jsonl", 0),  # before the first step
        ("data/rollouts/*.rollouts", 0),  # in or before the first draw
        ("checkpoints/step_00000003.partial", 0),  # in a save, steps 4 to 6 drawn or not
        ("checkpoints/step_00000003", 777),  # between draws, and the last write was torn
        ("checkpoints/step_00000006", 1),  # in the last window
        ("data/rationales-after.jsonl", 0),  # after the last step, before its checkpoint
        ("checkpoints/step_00000008", 0),  # before DONE
    )
    codes = []
    for moment, torn in moments:
        if next(stage.glob(moment), None) is not None:
            continue  # the last attempt lived a little longer, and came past this one
        (ended,) = server._job(
            {
                "target": TARGET,
                "arguments": {"start": str(start), "run": str(run), **LAGGING},
                "world": 1,
                "timeout": 60,
                "kill_when": [str(stage), moment],
            }
        )
        assert ended.code in (0, -9), ended.err[-3000:]
        codes.append(ended.code)
        if torn and ledger.exists() and not (stage / "DONE").exists():
            content = ledger.read_bytes()
            ledger.write_bytes(content[: max(0, len(content) - torn)])
    assert codes.count(-9) >= 4, "the run ended before it was killed often enough"
    server.call(TARGET, {"start": str(start), "run": str(run), **LAGGING})
    assert_same_run(stage, whole)


def test_recorded_rollouts_are_read_and_not_drawn(start: Path, whole: Path, server: ForkServer) -> None:
    """A resumed run paid for its rollouts once more: with the record there, an engine that cannot sample is enough."""
    run = start / "again"
    stage = run / thinking.STAGE
    (stage / "data" / "rollouts").mkdir(parents=True)
    name = "rollouts/00000-of-00001.rollouts"
    (stage / "data" / name).write_bytes((whole / "data" / name).read_bytes())
    server.call("tests.e2e.test_variational:without_sampling", {"start": str(start), "run": str(run)})
    assert (stage / "data" / name).read_bytes() == (whole / "data" / name).read_bytes()
    # The probe, whose rollouts count as well, was left out here.
    a, b = (curve(s / "metrics.jsonl")[1:4] for s in (stage, whole))
    costs = [{name: r.pop(name) for name in ("rollout_tokens", "forward_passes")} for r in (*a, *b)]
    assert a == b
    assert costs[0]["rollout_tokens"] > 1000, "what the draw had cost is in the record"


def without_sampling(start: str, run: str) -> None:
    """Take the first three steps from the record; the engine's rows are closed to everything else."""
    from ra3_megatron.report.progress import Progress

    config = thinking.make_config(Path(start), run, **LAGGING)
    with initialize(config.parallel) as parallel:
        step = thinking.open_e_step(Path(start), run, parallel, **LAGGING)
        step.drawing.drawer.engine.max_tokens = 1  # any row that is opened is refused
        with step.metrics, step.drawing, Progress(8, "again", False) as progress:
            step.metrics.log(0)
            assert step._order(1)
            step._learn(step.drawing.collect(), progress)
        assert step.state.step == 3


SHORT = {"variational": {"steps": 3, "max_lag": 1}}


@pytest.fixture(scope="module")
def short(start: Path, server: ForkServer) -> Path:
    run = start / "short"
    server.call(TARGET, {"start": str(start), "run": str(run), **SHORT})
    return run / thinking.STAGE


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("dp2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        ("tp2", {"tensor": 2, "sequence": True}),
        ("pp2", {"pipeline": 2}),
    ],
)
def test_two_processes_learn_what_one_learns(
    name: str, parallel: dict[str, Any], start: Path, short: Path, server: ForkServer
) -> None:
    """Replicas that draw with parameters not gathered yet, baselines over a part of the group, lost snippets."""
    run = start / name
    results = server.call(TARGET, {"start": str(start), "run": str(run), **SHORT, "parallel": parallel}, world=2)
    assert results[0] == results[1]
    stage = run / thinking.STAGE
    for a, b in zip(curve(stage / "metrics.jsonl"), curve(short / "metrics.jsonl"), strict=True):
        # The gap is rounding itself; an action at the edge of the clip falls to either side.
        for figure in a.keys() - {"rollout_gap", "rollout_tokens", "forward_passes", "clipped"}:
            assert a[figure] == pytest.approx(b[figure], rel=2e-3, abs=2e-4, nan_ok=True), (a["step"], figure)
    mine, theirs = tensors(stage), tensors(short)
    weights = {k: v for k, v in theirs.items() if not k.startswith("optimizer") and v.is_floating_point() and v.dim()}
    assert len(weights) > 8
    for key, expected in weights.items():
        rows = min(len(expected), len(mine[key]))  # padding of the vocabulary differs
        difference = (mine[key][:rows] - expected[:rows]).abs().max() / expected.abs().max()
        assert difference < 1e-3, key


AHEAD = {
    "variational": {"steps": 4, "max_lag": 1, "draw_ahead": True, "reward": "gain", "lr": 1e-4},
    "latent": {"posterior": "hindsight"},
    "train": {"seq_length": 256},
}
"""Each step's rollouts are drawn before the step before; a replica that only draws sees the whole text first."""


def test_one_trains_and_one_generates(start: Path, server: ForkServer) -> None:
    """Rollouts put together with other think sets or texts, drawn again with newer weights, probed with older ones."""
    whole, split = (start / name / thinking.STAGE for name in ("ahead", "split"))
    server.call(TARGET, {"start": str(start), "run": str(whole.parent), **AHEAD})
    assert [r["lag"] for r in curve(whole / "metrics.jsonl") if "lag" in r] == [0, 1, 1, 1]
    divided = {"start": str(start), "run": str(split.parent), **AHEAD, "parallel": {"generation_replicas": 1}}
    moment = [str(split), "checkpoints/step_00000002.partial"]
    killed = server._job({"target": TARGET, "arguments": divided, "world": 2, "timeout": 60, "kill_when": moment})
    assert [e.code for e in killed] == [-9, -9], killed[0].err[-3000:]
    results = server.call(TARGET, divided, world=2)
    assert results[0] == results[1]
    assert_same_run(split, whole)
