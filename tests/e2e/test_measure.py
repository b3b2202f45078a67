"""The measure stage: same figures on any number of processes, resumed arm by arm, refused without held-out code."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import CheckpointConfig
from ra3_megatron.evaluation.held_out import FORMS
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.stages.measure import choose_snippets
from tests.distributed.launch import run_ranks
from tests.e2e import generating, measuring


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folder with corpus and weights, checkpoints by arm): the arm `ra3` thinks more often than the others."""
    folder = tmp_path_factory.mktemp("start")
    config = generating.make_config(folder)
    with initialize(config.parallel) as parallel:
        generating.write_start(folder, parallel)
        arch = generating.architecture(config)
        seed_everything(5, parallel)
        chunks = build_model(arch, dataclasses.replace(config.model, init_std=0.25), parallel)
        store = CheckpointStore(folder / "other", CheckpointConfig(async_save=False), parallel, architecture=arch)
        assert store.save(0, chunks, None, None, TrainState("other")).ok
    (other,) = [str(p.parent) for p in (folder / "other").glob("*/DONE")]
    return folder, {"ra3": str(generating.weights(folder)), "ntp": other}


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The stage on one process; folder and result."""
    run = tmp_path_factory.mktemp("alone")
    return run / "09-measure", measuring.measure(str(start[0]), str(run), start[1], start[1]["ntp"])


def read(folder):
    return json.loads((folder / "measured.json").read_text())


def records(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"rationales-{name}.jsonl").read_text().splitlines()]


def test_what_is_written(start, alone):
    """Arms on other tokens than one another, or rationales of other snippets than the figures."""
    folder, result = alone
    measured = read(folder)
    assert measured["snippets"] == result["snippets"] == measuring.SNIPPETS
    everyone = [measured["base"], *measured["arms"].values()]
    assert len({f[form]["tokens"] for f in everyone for form in FORMS}) == 1
    for figures in everyone:
        assert figures["bare"]["low"] <= figures["bare"]["nats_per_token"] <= figures["bare"]["high"]
        assert figures["multi_sample"]["nats_per_token"] <= figures["thinking"]["nats_per_token"]
    ra3 = measured["arms"]["ra3"]
    assert 0 < ra3["think_rate"] < 1
    assert 0 < ra3["discount_of_duration"] < 1 <= ra3["duration"]
    assert (ra3["flops"], ra3["raw_tokens"], ra3["seconds"]) == (1e9, 5000, 2.5)
    assert result["bare"]["ra3"] == measured["arms"]["ra3"]["bare"]["nats_per_token"]
    for name in ("base", "ra3", "ntp"):
        found = records(folder, name)
        assert len(found) == 2 * measuring.SNIPPETS
        nats = -sum(line["log_prob"] for record in found for line in record["lines"]) / 2
        thinking = (measured["base"] if name == "base" else measured["arms"][name])["thinking"]
        assert nats / thinking["tokens"] == pytest.approx(thinking["nats_per_token"])


def test_pairs(alone):
    """Each arm against ntp, ntp against the base model; here ntp is the base model, so nothing differs."""
    measured = read(alone[0])
    ra3, ntp = measured["paired"]["ra3"], measured["paired"]["ntp"]
    assert (ra3["bare"]["against"], ntp["bare"]["against"]) == ("ntp", "base")
    assert measured["base"]["thinking"] == measured["arms"]["ntp"]["thinking"], "random numbers differ between models"
    assert [ntp[form]["difference"] for form in FORMS] == [0, 0, 0]
    assert ntp["bare"]["p_value"] == 1
    for key, mine, theirs in (("bare", "bare", "bare"), ("thinking_against_bare", "thinking", "bare")):
        one, other = (measured["arms"][a][f]["nats_per_token"] for a, f in (("ra3", mine), ("ntp", theirs)))
        assert ra3[key]["difference"] == pytest.approx(one - other)


def test_same_on_two_processes(start, alone, tmp_path):
    """Random numbers by replica, snippets left out or counted twice, a last replica without any."""
    runs = {str(tmp_path / name): sizes for name, sizes in (("dp", {}), ("tp", {"tensor": 2}), ("pp", {"pipeline": 2}))}
    args = {"folder": str(start[0]), "arms": start[1], "base": start[1]["ntp"], "runs": runs}
    run_ranks("tests.e2e.measuring:layouts", 2, args, 150, tmp_path)
    for run in runs:
        there = Path(run) / "09-measure"
        for name, figures in read(alone[0])["arms"].items():
            again = read(there)["arms"][name]
            for form in FORMS:
                assert again[form] == pytest.approx(figures[form], rel=1e-4)
            assert again["think_rate"] == figures["think_rate"]
        one, other = ([(r["snippet"], r["member"], r["name"]) for r in records(f, "ra3")] for f in (alone[0], there))
        assert one == other


def test_goes_on_arm_by_arm(start, alone, tmp_path, capsys):
    """A killed stage measures what is missing; another checkpoint, or other settings, are measured again."""
    folder, arms = start
    measuring.measure(str(folder), str(tmp_path), {"ra3": arms["ra3"]}, None)
    stage = tmp_path / "09-measure"
    before = (stage / "data" / "scores-ra3.json").stat().st_mtime_ns
    (stage / "DONE").unlink()
    capsys.readouterr()
    measuring.measure(str(folder), str(tmp_path), arms, arms["ntp"])
    assert (stage / "data" / "scores-ra3.json").stat().st_mtime_ns == before
    said = capsys.readouterr().out
    assert "measuring ntp" in said
    assert "measuring ra3" not in said
    assert "ra3 - ntp, bare" in said
    assert read(stage) == read(alone[0])
    (stage / "DONE").unlink()
    measuring.measure(str(folder), str(tmp_path), {**arms, "ra3": arms["ntp"]}, arms["ntp"])
    assert "measuring ra3" in capsys.readouterr().out
    assert read(stage)["paired"]["ra3"]["bare"]["difference"] == 0
    measuring.measure(str(folder), str(tmp_path), arms, None)
    assert "measuring" not in capsys.readouterr().out, "done is done"


def test_more_snippets_than_there_are(start, tmp_path, capsys):
    found = measuring.measure(
        str(start[0]), str(tmp_path), {"ra3": start[1]["ra3"]}, None, measure={"snippets": 10_000, "samples": 1}
    )
    assert found["snippets"] < 10_000
    assert f"has {found['snippets']}: all are used" in capsys.readouterr().out


def test_nothing_held_out(start, tmp_path):
    folder, arms = start
    config = generating.make_config(tmp_path)
    from ra3_megatron.data.prepare import prepare, prepare_tokenizer

    data = dataclasses.replace(config.data, validation_fraction=0.0)
    prepare(data, prepare_tokenizer(config.data, folder / "tokenizer"), generating.SNIPPET, tmp_path / "corpus")
    with pytest.raises(UserError, match=r"raise data\.validation_fraction"):
        measuring.measure(str(tmp_path), str(tmp_path / "run"), {"ra3": arms["ra3"]}, None)


def test_the_choice_of_snippets():
    """Fixed, without repetition, spread over the store, and not the first ones, which are of a few documents."""
    chosen = choose_snippets(1000, 50)
    assert chosen == choose_snippets(1000, 50) == sorted(set(chosen))
    assert max(b - a for a, b in pairwise(chosen)) < 150
    assert choose_snippets(3, 50) == [0, 1, 2]
