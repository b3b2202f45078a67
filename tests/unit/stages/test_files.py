"""The files a configuration names: what is missing is told before a chain of jobs is queued, and nothing else is."""

from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.stages.files import missing_files, refuse_missing, undone
from ra3_megatron.stages.graph import graph


def everything(folder: Path) -> RunConfig:
    """A chain with all that can be named by path."""
    return config_from_dict({
        "run": {"dir": str(folder / "run"), "arms": ["ra3"]},
        "model": {"source": str(folder / "model")},
        "data": {
            "corpus": {"kind": "datasets", "files": [str(folder / "corpus/*.parquet")]},
            "decontamination": {"benchmarks": [str(folder / "bench/HumanEval.jsonl")]},
            "validation_fraction": 0.1,
        },
        "rlvr": {"steps": 1, "tasks": str(folder / "tasks.jsonl")},
        "evaluation": {"benchmarks": ["humaneval"], "data_dir": str(folder / "bench")},
        "train": {"steps": 1},
    })  # fmt: skip


def make(folder: Path) -> None:
    for name in ("model", "corpus", "bench"):
        (folder / name).mkdir()
    for name in ("corpus/a.parquet", "bench/HumanEval.jsonl", "tasks.jsonl"):
        (folder / name).touch()


def test_all_that_is_missing_is_named_at_once(tmp_path):
    """One missing file a launch: five launches, each after a night."""
    config = everything(tmp_path)
    lines = missing_files(config, graph(config))
    for word in ("model.source", "data.corpus.files", "decontamination", "rlvr.tasks", "evaluation.data_dir"):
        assert sum(word in line for line in lines) == 1, lines
    with pytest.raises(UserError, match="and 4 more"):
        refuse_missing(lines)


def test_nothing_is_missed_when_all_is_there(tmp_path):
    """A check that cannot be satisfied would stop every run."""
    make(tmp_path)
    config = everything(tmp_path)
    assert missing_files(config, graph(config)) == []
    refuse_missing([])


def test_what_a_finished_stage_read_may_be_gone(tmp_path):
    """A corpus removed after its preparation kept a run from going on."""
    config = everything(tmp_path)
    for number, node in enumerate(graph(config)):
        if node.kind in ("import", "prepare", "tasks"):
            stage = tmp_path / "run" / f"{number:02d}-{node.name}"
            stage.mkdir(parents=True)
            (stage / "DONE").write_text("{}")
    (line,) = missing_files(config, undone(config, tmp_path / "run"))
    assert "evaluation.data_dir" in line


def test_a_job_asks_for_its_own_files_only(tmp_path):
    """The job of one stage was refused for a file that another node's stage reads."""
    config = everything(tmp_path)
    export = [node for node in graph(config) if node.kind == "export"]
    assert missing_files(config, undone(config, tmp_path / "run", export)) == []
