"""A run that began on one process goes on over two, split any way: same data, same losses."""

import json
import re
import shutil

import pytest

from tests.e2e.small import write_config

STEPS, INTERVAL = 24, 6
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2": ["parallel.pipeline=2"],
    "dp2": ["parallel.data=2", "train.micro_batch_size=1"],
}
TOLERANCE = 1e-4


def losses(run):
    """Per step, what the run logged about data and loss."""
    found = {}
    for line in (run / "01-ntp" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {}).update(record)
    return found


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """A folder with an uninterrupted run and one that was killed after its first checkpoint, both on one process."""
    folder = tmp_path_factory.mktemp("layouts")
    settings = {
        "train": {"steps": STEPS, "eval_interval": 8},
        "checkpoint": {"interval": INTERVAL, "async_save": False},
    }
    config = str(write_config(folder, **settings))
    (whole,) = server.cli(["midtrain", config, f"run.dir={folder / 'whole'}"])
    assert whole.code == 0, whole.err[-3000:]
    first = f"01-ntp/checkpoints/step_{INTERVAL:08d}/DONE"
    (killed,) = server.cli(
        ["midtrain", config, f"run.dir={folder / 'killed'}"], kill_when=(folder / "killed", first)
    )  # fmt: skip
    assert killed.code == -9, "it ended before it was killed"
    assert not (folder / "killed" / "01-ntp" / "DONE").exists()
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_goes_on_in_another_layout(layout, runs, server):
    """Resuming over other processes repeated data or lost the optimizer's moments (NeMo-RL#949, Megatron-LM#6920)."""
    run = runs / layout
    shutil.copytree(runs / "killed", run, symlinks=True)
    ended = server.cli(
        ["midtrain", str(runs / "config.yaml"), f"run.dir={run}", *LAYOUTS[layout]], world=2, timeout=150
    )
    assert [e.code for e in ended] == [0, 0], "\n".join(e.err[-2000:] for e in ended)
    resumed = re.search(r"resumed from .*step_(\d+)", ended[0].out)
    assert resumed is not None
    assert INTERVAL <= int(resumed[1]) < STEPS
    whole, found = losses(runs / "whole"), losses(run)
    assert list(found) == list(whole) == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        for same in ("samples", "loss_tokens", "tokens", "lr"):
            assert found[step][same] == whole[step][same], (step, same)
        assert found[step]["loss"] == pytest.approx(whole[step]["loss"], rel=TOLERANCE), step
        assert found[step]["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=10 * TOLERANCE), step
    measured = [s for s in whole if "validation_loss" in whole[s]]
    assert measured == [0, 8, 16, 24]
    for step in measured:
        assert found[step]["validation_loss"] == pytest.approx(whole[step]["validation_loss"], rel=TOLERANCE)
    states = [
        json.loads((r / "01-ntp" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
        for r in (runs / "whole", run)
    ]
    for same in ("step", "tokens", "samples", "data", "skipped_steps"):
        assert states[0][same] == states[1][same], same
    assert states[0]["layout"] != states[1]["layout"]


def test_context_parallelism_that_packs_other_windows_is_refused(runs, server):
    """It said "another data set", when the padding of sequences was another."""
    run = runs / "cp2"
    shutil.copytree(runs / "killed", run, symlinks=True)
    zero, one = server.cli(
        ["midtrain", str(runs / "config.yaml"), f"run.dir={run}", "parallel.context=2"], world=2, timeout=100
    )
    assert (zero.code, one.code) == (2, 2)
    assert "parallel.context 1" in zero.err
    assert "parallel.context=1" in zero.err
