"""On the folder of another run: what would mix two runs is refused with the reason; what was accepted is done."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e import rl, small


@pytest.fixture
def begun(base, tmp_path) -> Path:
    """A copy of a finished run with the last two stages open again: it would resume from its checkpoint."""
    shutil.copytree(base / "run", tmp_path / "run", symlinks=True)
    for stage in ("01-ntp", "02-export"):
        (tmp_path / "run" / stage / "DONE").unlink()
    small.write_config(tmp_path, train={"steps": 3, "eval_interval": 0})
    return tmp_path


def checkpoints(run: Path) -> dict[str, int]:
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in sorted(run.glob("*/checkpoints/**/*"))}


def refused(server, folder: Path, *arguments: str, words: tuple[str, ...]) -> str:
    before = checkpoints(folder / "run")
    (ended,) = server.cli(["midtrain", str(folder / "config.yaml"), f"run.dir={folder / 'run'}", *arguments])
    assert ended.code == 2, ended.err[-3000:]
    lines = [line for line in ended.err.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1, ended.err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert checkpoints(folder / "run") == before
    return lines[0]


def same_corpus(begun: Path, base: Path) -> list[str]:
    return [f"data.corpus.path={base / 'code'}"]


def test_changed_configuration_is_refused_with_the_differences(server, base, begun):
    """Resuming with another learning rate mixed two runs (Megatron-LM#6920)."""
    line = refused(
        server, begun, *same_corpus(begun, base), "optimizer.lr=0.5", "checkpoint.interval=1",
        words=("optimizer.lr: 0.003 -> 0.5", "run.dir", "--accept-changes"),
    )  # fmt: skip
    assert "checkpoint.interval" not in line, "what may change is not a reason"


def test_checkpoint_of_another_model_is_refused(server, base, begun):
    """--accept-changes is about settings; weights of another shape never fit."""
    refused(
        server, begun, *same_corpus(begun, base), "model.architecture.ffn_hidden_size=96", "--accept-changes",
        words=("another model", "ffn_hidden_size: checkpoint 64, run 96"),
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["prepare", "ntp", "tasks"])
def test_tokenizer_that_the_model_has_no_rows_for(stage, server, base, tmp_path):
    """Of a corpus that was there already, `--stage ntp` met the ids past the embedding with an IndexError."""
    tasks = str(rl.write_tasks(tmp_path / "tasks.jsonl"))
    small.write_config(tmp_path, rlvr={"steps": 2, "tasks": tasks, "prompts_per_step": 4, "max_tokens": 24})
    if stage != "prepare":
        shutil.copytree(base / "run" / "00-prepare", tmp_path / "run" / "00-prepare", symlinks=True)
        shutil.copy(base / "run" / "config.yaml", tmp_path / "run")
    refused(
        server, tmp_path, *same_corpus(tmp_path, base), "model.architecture.vocab_size=300", "--accept-changes",
        "--stage", stage, words=("tokenizer has 51", "300 embedding rows", "larger vocabulary"),
    )  # fmt: skip


def test_other_data_on_resume_is_refused(server, base, begun):
    """The position in one data set means nothing in another (NeMo-RL#4183)."""
    shutil.copytree(base / "code", begun / "code", dirs_exist_ok=True)
    (begun / "code" / "more.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40)))
    shutil.rmtree(begun / "run" / "00-prepare")
    refused(
        server, begun, f"data.corpus.path={begun / 'code'}", "--accept-changes",
        words=("data set", "start a new run"),
    )  # fmt: skip


def test_other_seed_on_resume_is_refused(server, base, begun):
    """Another order of the data, from the middle on."""
    refused(server, begun, *same_corpus(begun, base), "run.seed=8", "--accept-changes", words=("data set",))


def test_longer_training_is_accepted_on_purpose(server, base, begun):
    """The commonest change of all: more steps; Megatron's scheduler refuses another length with an assertion."""
    (ended,) = server.cli(
        ["midtrain", str(begun / "config.yaml"), f"run.dir={begun / 'run'}", *same_corpus(begun, base),
         "train.steps=5", "--accept-changes"]
    )  # fmt: skip
    assert ended.code == 0, ended.err[-3000:]
    assert "resumed from" in ended.out
    assert json.loads((begun / "run" / "01-ntp" / "DONE").read_text())["step"] == 5
    records = [json.loads(line) for line in (begun / "run" / "01-ntp" / "metrics.jsonl").read_text().splitlines()]
    rates = {r["step"]: r["lr"] for r in records if "lr" in r}
    assert rates[5] == pytest.approx(0.0, abs=1e-9), "the schedule ends at the new last step"
    assert rates[4] > 0.0


def test_changed_optimizer_settings_are_used(server, base, begun):
    """Megatron takes rate, betas and decay from the checkpoint: what was asked for and accepted was not done."""
    (ended,) = server.cli(
        ["midtrain", str(begun / "config.yaml"), f"run.dir={begun / 'run'}", *same_corpus(begun, base),
         "train.steps=5", "optimizer.lr=0.5", "optimizer.schedule=constant", "optimizer.beta2=0.5",
         "optimizer.weight_decay=0.3", "--accept-changes"]
    )  # fmt: skip
    assert ended.code == 0, ended.err[-3000:]
    records = [json.loads(line) for line in (begun / "run" / "01-ntp" / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r["lr"] for r in records if "lr" in r}[4] == 0.5
    state = json.loads((begun / "run" / "01-ntp" / "checkpoints" / "step_00000005" / "state.json").read_text())
    assert state["lr_schedule"]["beta2"] == 0.5


def test_damaged_saved_configuration_is_named(server, base, begun):
    """A traceback of the YAML reader, for a file the user never wrote."""
    (begun / "run" / "config.yaml").write_text("run: {dir: [}")
    refused(server, begun, *same_corpus(begun, base), words=("run/config.yaml", "YAML"))


def test_damaged_done_marker_is_named(server, base, begun):
    """A file system that filled up left an empty marker."""
    (begun / "run" / "00-prepare" / "DONE").write_text("{")
    refused(server, begun, *same_corpus(begun, base), words=("00-prepare/DONE", "delete it"))
