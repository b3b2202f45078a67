"""RA3 as the main job on a tiny model: every arm, every stage alone, killed in every stage."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ra3_megatron.report.schema import curve
from tests.e2e.forked import ROOT, Ended, ForkServer
from tests.e2e.small import all_tensors, write_config

ARMS = ["ra3", "ntp", "self_comment", "bolt", "brite"]


def ra3_config(folder: Path, **changes: dict[str, Any]) -> Path:
    """Seconds of RA3: two optimizer steps of a base model, four E-steps, a corpus of a few dozen snippets."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"arms": ARMS, "rounds": 1},
        "base": {"tokens": 12_000},
        "data": {"snippet_tokens": 64, "corpus": {"kind": "folder", "path": str(folder / "code"), "limit": 4}},
        "train": {"steps": None, "tokens": 6000, "eval_interval": 4, "eval_windows": 4},
        # Hot, so that so weak a model thinks at all.
        "latent": {"max_latent_tokens": 6, "max_batch": 16, "temperature": 2.5},
        "variational": {
            "steps": 4, "snippets_per_step": 4, "group_size": 2, "checkpoint_interval": 2, "probe_snippets": 2,
            "flat_window": 0, "lr": 1e-3, "max_lag": 1,
        },
        "generate": {"shard_snippets": 16, "bolt_samples": 2},
        "measure": {"snippets": 4, "samples": 2},
    }  # fmt: skip
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    return write_config(folder, **sections)


def cli(server: ForkServer, *arguments: str) -> Ended:
    """The command `ra3` on one process."""
    [ended] = server.cli(list(arguments))
    return ended


def done_stages(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("*/DONE"))


def drawn(stage: Path) -> str:
    """The curve of a stage as text, in which a NaN equals itself."""
    return repr(curve(stage / "metrics.jsonl"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def all_arms(server, tmp_path_factory):
    """A run of every arm; the RA3 arm in one round."""
    folder = tmp_path_factory.mktemp("arms")
    path = ra3_config(folder)
    ended = cli(server, "midtrain", str(path))
    assert ended.code == 0, ended.err[-4000:]
    return folder / "run", path, ended


def test_every_arm_ends_with_a_checkpoint_and_the_table(all_arms):
    run, _, ended = all_arms
    assert done_stages(run) == [
        "00-prepare", "01-prepare-base", "02-base", "03-ra3-variational-1", "04-ra3-generate-1", "05-ra3-sft-1",
        "06-ntp", "07-self_comment-generate-1", "08-self_comment-sft-1", "09-bolt-generate-1", "10-bolt-sft-1",
        "11-brite-variational-1", "12-brite-generate-1", "13-brite-sft-1", "14-export", "15-measure",
    ]  # fmt: skip
    measured = json.loads((run / "15-measure" / "measured.json").read_text())
    assert set(measured["arms"]) == set(ARMS)
    tokens = {arm: figures["bare"]["tokens"] for arm, figures in measured["arms"].items()}
    assert len(set(tokens.values())) == 1, "arms were measured on different code"
    assert (run / "report.html").stat().st_size > 1000
    assert "report" in ended.out


def test_arms_see_the_same_code_equally_often(all_arms):
    """A mean over tokens that mixes comments in, or longer training of one arm, would not compare."""
    run, _, _ = all_arms
    seen = {p.parent.name: json.loads(p.read_text())["code_tokens"] for p in run.glob("*-sft-1/DONE")}
    seen["ntp"] = json.loads((run / "06-ntp" / "DONE").read_text())["code_tokens"]
    windows = 8 * 128
    assert max(seen.values()) - min(seen.values()) <= windows, seen


def test_the_same_command_again_writes_nothing_but_the_report(all_arms, server):
    run, path, _ = all_arms
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "report.html")}
    assert cli(server, "midtrain", str(path)).code == 0
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "report.html")}
    assert before == after


def test_stages_one_by_one_are_the_whole_run(all_arms, server, tmp_path):
    """What a chain of jobs does; and a stage whose turn has not come says what is missing."""
    whole, _, _ = all_arms
    path = ra3_config(tmp_path, run={"arms": ["ra3"]})
    early = cli(server, "midtrain", str(path), "--stage", "sft", "--round", "1")
    assert early.code == 2
    assert "ra3-generate-1" in early.err
    order = ("prepare", "prepare-base", "base", "variational", "generate", "sft")
    for stage in order:
        state = cli(server, "midtrain", str(path), "--status")
        assert f"{order.index(stage)} of 8 stages done" in state.out
        ended = cli(server, "midtrain", str(path), "--stage", stage)
        assert ended.code == 0, ended.err[-3000:]
    for name in ("03-ra3-variational-1", "05-ra3-sft-1"):
        assert drawn(tmp_path / "run" / name) == drawn(whole / name)


def test_a_second_round_starts_from_the_first_rounds_weights(server, tmp_path):
    path = ra3_config(tmp_path, run={"arms": ["ra3"], "rounds": 2}, export={"enabled": False})
    ended = cli(server, "midtrain", str(path))
    assert ended.code == 0, ended.err[-4000:]
    run = tmp_path / "run"
    first, second = (json.loads((run / f"{n}" / "DONE").read_text()) for n in ("05-ra3-sft-1", "08-ra3-sft-2"))
    assert first["parameters_sha256"] != second["parameters_sha256"]
    # bare loss before the second M-step is that after the first: the same weights on the same windows
    assert second["bare_code_loss_before"] == pytest.approx(first["bare_code_loss"], abs=1e-6)


def test_sigkill_in_every_stage_changes_nothing(tmp_path):
    """Work lost or repeated, rollouts of other weights mixed in, half-written shards taken (slime#1761)."""
    path = ra3_config(tmp_path, run={"arms": ["ra3"]})
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.killer", str(tmp_path), str(path), "stages", "3"],
        cwd=ROOT, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    inside = {"02-base", "03-ra3-variational-1", "04-ra3-generate-1", "05-ra3-sft-1", "07-measure"}
    # A stage of a second can be over before the kill that was meant for it.
    assert len(inside & set(counts["stages"])) >= 3, counts
    assert done_stages(whole) == done_stages(killed)
    for name in done_stages(whole):
        results = [json.loads((run / name / "DONE").read_text()) for run in (whole, killed)]
        timeless = [{k: v for k, v in r.items() if "second" not in k} for r in results]
        assert timeless[0] == timeless[1], name
        if (whole / name / "metrics.jsonl").exists():
            assert drawn(whole / name) == drawn(killed / name), name
        if "checkpoint" in timeless[0] and (whole / timeless[0]["checkpoint"] / "dist").exists():
            a, b = (all_tensors(run / timeless[0]["checkpoint"] / "dist") for run in (whole, killed))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a), name
    stored = sorted(p.relative_to(whole) for p in whole.glob("*-generate-1/data/**/*.bin"))
    assert stored
    assert all((whole / p).read_bytes() == (killed / p).read_bytes() for p in stored)
