"""RLVR on a world of which some replicas only generate: the same bits as without, killed, resumed, failing."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ra3_megatron.cli import main
from ra3_megatron.report.schema import curve, read_metrics
from tests.e2e import rl
from tests.e2e.forked import ForkServer
from tests.e2e.small import all_tensors

AHEAD = {"max_lag": 3, "draw_ahead": True}
"""Two steps are drawn at once, during the two before them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    rl.write_tasks(folder / "tasks.jsonl")
    return folder


def run(server: ForkServer, config: Path, world: int, **options: Any) -> Path:
    ended = server.cli(["rlvr", str(config)], world=world, **options)
    assert [e.code for e in ended] == [0] * world, "\n".join(e.err[-3000:] for e in ended)
    return config.parent / config.stem / rl.STAGE


@pytest.fixture(scope="module")
def together(folder: Path, base: Path, server: ForkServer) -> Path:
    """One process that does both."""
    return run(server, rl.write_config(folder, base, "together", rlvr=AHEAD), 1)


def result(stage: Path) -> dict[str, Any]:
    found = json.loads((stage / "DONE").read_text())
    found.pop("seconds")
    return found


def same(stage: Path, other: Path) -> None:
    assert result(stage) == result(other)
    assert curve(stage / "metrics.jsonl") == curve(other / "metrics.jsonl")
    for place in ("answers", "validation", "samples"):
        for file in (other / "data" / place).iterdir():
            assert (stage / "data" / place / file.name).read_bytes() == file.read_bytes(), file.name
    a, b = (all_tensors(s.parent / result(s)["checkpoint"] / "dist") for s in (stage, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_one_trains_and_one_generates(folder: Path, base: Path, together: Path, server: ForkServer) -> None:
    """Weights of another step drew, answers of another draw were learned from, figures of one side were lost."""
    assert [r["lag"] for r in read_metrics(together / "metrics.jsonl") if "lag" in r] == [0, 1, 2, 3, 2, 3]
    config = rl.write_config(folder, base, "split", rlvr=AHEAD, parallel={"generation_replicas": 1})
    stage = run(server, config, 2)
    same(stage, together)
    walls = [r["wall"] for r in read_metrics(stage / "metrics.jsonl") if "lag" in r]
    assert all(w["trainer_idle_seconds"] > 0 for w in walls[::2])
    assert all(w["trainer_idle_seconds"] == 0 for w in walls[1::2])
    assert walls[0]["transfer_seconds"] > 0
    assert walls[2]["transfer_seconds"] == 0, "the first weights draw twice"
    assert walls[4]["transfer_seconds"] > 0


def test_asked_killed_and_resumed(folder: Path, base: Path, together: Path, server: ForkServer) -> None:
    """What was drawn ahead was drawn again with newer weights after a crash, or by another side with other numbers."""
    config = rl.write_config(folder, base, "killed", rlvr=AHEAD, parallel={"generation_replicas": 1})
    stage = folder / "killed" / rl.STAGE
    codes = server.call(f"{__name__}:asked_to_leave", {"config": str(config), "stage": str(stage)}, world=2)
    assert codes == [85, 85], "a signal to the process that generates is one to all"
    assert [p.name for p in (stage / "checkpoints").iterdir()] == ["step_00000002"]

    answers, hidden = stage / "data" / "answers", stage / "data" / "hidden"
    answers.rename(hidden)
    ended = server.cli(["rlvr", str(config), "parallel.generation_replicas=0"])
    assert ended[0].code == 2
    assert "lacks answers that the weights of step 0 gave" in ended[0].err
    for file in answers.iterdir():
        file.unlink()
    answers.rmdir()
    hidden.rename(answers)

    ended = server.cli(["rlvr", str(config)], world=2, kill_when=(stage, "checkpoints/step_00000004.partial"))
    assert [e.code for e in ended] == [-9, -9]
    end = "checkpoints/step_00000006.partial"
    (alone,) = server.cli(["rlvr", str(config), "parallel.generation_replicas=0"], kill_when=(stage, end))
    assert alone.code == -9, alone.err[-3000:]
    same(run(server, config, 2), together)


def asked_to_leave(config: str, stage: str) -> Any:
    """The command's exit code; the second process gets SIGUSR1 when it is about to draw."""

    def ask() -> None:
        while next(Path(stage).glob("data/answers/*.answers"), None) is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    if os.environ["RANK"] == "1":
        threading.Thread(target=ask, daemon=True).start()
    sys.argv = ["ra3", "rlvr", config]
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("rank", [0, 1], ids=["training", "generating"])
def test_a_process_that_dies_ends_all(rank: int, folder: Path, base: Path, server: ForkServer) -> None:
    """The other side waited until its deadline, or forever, and nobody said for whom."""
    name = f"dies-{rank}"
    config = rl.write_config(folder, base, name, rlvr=AHEAD, parallel={"generation_replicas": 1})
    moment = (folder / name / rl.STAGE, "data/answers/*.answers")
    ended = server.cli(["rlvr", str(config)], world=2, kill_when=moment, killed=[rank])
    assert ended[rank].code == -9
    assert ended[1 - rank].code == 1
    assert f"rank {rank}" in ended[1 - rank].err
    assert ended[0].seconds < 50, "found out by a deadline"


SHORT = {"steps": 2, "max_lag": 1, "draw_ahead": True, "eval_interval": 0, "validation_tasks": 0}


def test_parts_of_the_model_find_their_counterparts(folder: Path, base: Path, server: ForkServer) -> None:
    """A part of the model was sent to the process with another part."""
    layout = {"tensor": 2, "sequence": True}
    whole = run(server, rl.write_config(folder, base, "tp2", rlvr=SHORT, parallel=layout), 2)
    layout = {**layout, "generation_replicas": 1}
    config = rl.write_config(folder, base, "tp2-split", rlvr=SHORT, parallel=layout)
    same(run(server, config, 4), whole)


def test_sides_of_different_size(folder: Path, base: Path, server: ForkServer) -> None:
    """Groups went to a training replica that has other slots, or counted twice."""
    overlap, train = {"overlap_grad_reduce": True, "overlap_param_gather": True}, {"global_batch_size": 12}
    whole = run(server, rl.write_config(folder, base, "dp2", rlvr=SHORT, parallel=overlap, train=train), 2)
    layout = {**overlap, "generation_replicas": 1}
    split = run(server, rl.write_config(folder, base, "dp2-split", rlvr=SHORT, parallel=layout, train=train), 3)
    for a, b in zip(curve(split / "metrics.jsonl"), curve(whole / "metrics.jsonl"), strict=True):
        for figure in a.keys() - {"rollout_gap", "rollout_tokens", "forward_passes", "clipped"}:
            assert a[figure] == pytest.approx(b[figure], rel=2e-3, abs=2e-4, nan_ok=True), (a["step"], figure)
