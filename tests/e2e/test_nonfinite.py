"""A run whose loss becomes NaN: it stops and says where, or skips a few steps and then stops."""

import json

from tests.e2e.small import write_config


def test_stop_and_skip(server, tmp_path):
    """An absurd learning rate: `stop` ends at the first NaN, `skip` after too many; no checkpoint holds a NaN step."""
    path = str(
        write_config(
            tmp_path,
            optimizer={"lr": 1e30, "warmup_steps": 0, "clip_grad": 0.0},
            train={"eval_interval": 0},
            checkpoint={"interval": 1, "async_save": False, "keep_last": 30},
        )
    )
    (stopped,) = server.cli(["midtrain", path, f"run.dir={tmp_path / 'stop'}"])
    assert stopped.code == 1
    last = stopped.err.strip().splitlines()[-1]
    assert "NonFiniteStep: step 2: loss nan" in last
    assert "rank 0: micro-batch 0 (token ids" in last
    assert [p.parent.name for p in tmp_path.glob("stop/*/checkpoints/*/DONE")] == ["step_00000001"]
    (skipped,) = server.cli(
        ["midtrain", path, f"run.dir={tmp_path / 'skip'}", "train.on_nonfinite=skip", "train.max_skipped_steps=3"]
    )
    assert skipped.code == 1
    assert "4 steps in a row were skipped" in skipped.err.strip().splitlines()[-1]
    assert skipped.out.count("skipped: step ") == 4
    states = {
        p.parent.name: json.loads(p.read_text()) for p in sorted(tmp_path.glob("skip/*/checkpoints/*/state.json"))
    }
    assert [s["skipped_steps"] for s in states.values()] == [0, 1, 2, 3]
    hashes = {json.loads((p.parent / "DONE").read_text())["parameters_sha256"]
              for p in tmp_path.glob("skip/*/checkpoints/*/DONE")}  # fmt: skip
    assert len(hashes) == 1, "skipped steps changed the weights"
