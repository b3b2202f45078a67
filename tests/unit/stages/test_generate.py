"""The stage of rationale generation on one process: the corpus, the dataset and the counts it leaves."""

import ast
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.licenses import LICENSES_FILE, license_line
from ra3_megatron.data.packing import PackedWindows
from ra3_megatron.data.prepare import open_prepared
from ra3_megatron.data.trajectory import Kind
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.stages.generate import open_bootstrapped
from tests.e2e.generating import generate, write_start

STAGE = "04-ra3-generate-1"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared corpus and weights; every document has a licence."""
    folder = tmp_path_factory.mktemp("start")
    with initialize() as parallel:
        write_start(folder, parallel)
    source = open_prepared(folder / "corpus")
    names = dict.fromkeys(t.name for store in (source.train, source.validation) for t in store)
    (folder / "corpus" / LICENSES_FILE).write_text("".join(license_line(n, [f"license of {n}"]) for n in names))
    return folder


@pytest.fixture(scope="module")
def made(start: Path) -> tuple[Path, dict[str, Any]]:
    """The stage's folder and its result."""
    result = generate(str(start), str(start / "run"))
    return start / "run" / STAGE, result


def test_code_is_the_same_and_so_is_the_program(start: Path, made: tuple[Path, dict[str, Any]]) -> None:
    """Arms saw different code tokens; a thought in the middle of a statement."""
    source, infused = open_prepared(start / "corpus"), open_bootstrapped(made[0])
    assert infused.fingerprint == made[1]["fingerprint"] != source.fingerprint
    assert infused.start_id == source.start_id
    thoughts = 0
    for part in ("train", "validation"):
        before, after = getattr(source, part), getattr(infused, part)
        assert len(before) == len(after) > 30
        for expert, snippet in zip(before, after, strict=True):
            code = snippet.kinds() != Kind.THOUGHT
            np.testing.assert_array_equal(snippet.ids[code], expert.ids)
            assert snippet.name == expert.name
            programs = [ast.dump(ast.parse(t.program(source.tokenizer))) for t in (expert, snippet)]
            assert programs[0] == programs[1]
            thoughts += len(snippet.thoughts())
    assert thoughts == made[1]["thoughts"] > 30
    windows = PackedWindows(infused.train, 128, infused.tokenizer.eos_id)
    assert windows.packing.tokens > PackedWindows(source.train, 128, source.tokenizer.eos_id).packing.tokens


def test_dataset_loads_and_agrees_with_the_stores(start: Path, made: tuple[Path, dict[str, Any]], tmp_path) -> None:
    """Ids decoded and encoded again, rows in another order, numbers of another snippet."""
    infused = open_bootstrapped(made[0])
    files = {p: str(made[0] / "data" / "dataset" / f"{p}-*.parquet") for p in ("train", "validation")}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    tokenizer, latent = infused.tokenizer, infused.think_tokens.format
    for part in ("train", "validation"):
        store, rows = getattr(infused, part), loaded[part]
        assert rows["snippet"][:] == list(range(len(store)))
        for trajectory, row in zip(store, rows, strict=True):
            assert row["ids"] == trajectory.ids.tolist()
            assert row["name"] == trajectory.name
            assert row["code"] == tokenizer.decode(trajectory.ids)
            expert = trajectory.ids[trajectory.kinds() != Kind.THOUGHT]
            assert row["expert"] == tokenizer.decode(expert)
            assert row["decision_lines"] == [d.line for d in trajectory.decisions]
            assert len(row["line_log_probs"]) == trajectory.num_lines
            assert max(row["line_log_probs"]) <= 0
            p_think = dict(zip(row["decision_lines"], row["p_think"], strict=True))
            assert row["thoughts"] == [
                {"line": line, "text": latent.content(tokenizer.decode(ids)), "p_think": p_think[line]}
                for line, ids in trajectory.thoughts().items()
            ]
            assert row["licenses"] == [f"license of {trajectory.name}"]
            assert (row["provenance"]["stage"], row["provenance"]["round"]) == (STAGE, 1)
    assert loaded["train"][0]["provenance"]["corpus"] == open_prepared(start / "corpus").fingerprint


def test_counts(start: Path, made: tuple[Path, dict[str, Any]]) -> None:
    """What the report shows must be what is in the corpus."""
    stage, result = made
    report = json.loads((stage / "data" / "report.json").read_text())
    source, infused = open_prepared(start / "corpus"), open_bootstrapped(stage)
    train = report["train"]
    assert train["snippets"] == len(infused.train)
    assert train["tokens"] == int(infused.train.lengths.sum())
    assert train["thoughts"] == sum(len(t.thoughts()) for t in infused.train)
    assert train["decisions"] == sum(len(t.decisions) for t in infused.train)
    assert train["not_offered"] == sum(len(t.decisions) for t in source.train) - train["decisions"] > 0
    assert train["think_rate"] == train["thoughts"] / train["decisions"]
    assert train["thought_tokens"] == (train["tokens"] - source.train.lengths.sum()) / train["thoughts"]
    assert infused.report.tokens == train["tokens"] + report["validation"]["tokens"]
    assert result["snippets"] == train["snippets"] + report["validation"]["snippets"]
    assert result["rollout_tokens"] >= infused.report.tokens - 2 * result["snippets"]
    assert not (stage / "data" / "shards").exists()


def test_finished_stage_is_not_done_again(start: Path, made: tuple[Path, dict[str, Any]]) -> None:
    """A second call drew everything again, or left the doubles of a killed end."""
    stage, result = made
    (stage / "data" / "shards").mkdir()
    before = (stage / "data" / "corpus" / "train" / "ids.bin").stat().st_mtime_ns
    assert generate(str(start), str(start / "run")) == result
    assert (stage / "data" / "corpus" / "train" / "ids.bin").stat().st_mtime_ns == before
    assert not (stage / "data" / "shards").exists()


def test_bolt_keeps_one_of_several(start: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The resampled corpus was the first sample's; the bound is that of the whole text per code token."""
    result = generate(str(start), str(tmp_path / "run"), samples=3)
    assert 1 < result["effective_samples"] <= 3
    assert result["multi_sample_bound"] < 0
    assert result["fingerprint"] != made[1]["fingerprint"]
    # A random model's thoughts are no explanation of anything: most weight lies on samples with few of them.
    assert result["thoughts"] < made[1]["thoughts"]


def test_hindsight_leaves_no_trace_of_the_first_copy(start: Path, tmp_path: Path) -> None:
    """The text was in the corpus twice, or lines had no log-probabilities."""
    result = generate(str(start), str(tmp_path / "run"), latent={"posterior": "hindsight"}, train={"seq_length": 300})
    source, infused = open_prepared(start / "corpus"), open_bootstrapped(tmp_path / "run" / STAGE)
    assert result["thoughts"] > 0
    for expert, snippet in zip(source.train, infused.train, strict=True):
        np.testing.assert_array_equal(snippet.ids[snippet.kinds() != Kind.THOUGHT], expert.ids)
    files = str(tmp_path / "run" / STAGE / "data" / "dataset" / "train-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    assert all(np.isfinite(row["line_log_probs"]).all() for row in rows)


def test_unfinished_stage_is_refused(tmp_path: Path) -> None:
    """Training began on a part of the corpus."""
    with pytest.raises(UserError, match="no prepared corpus"):
        open_bootstrapped(tmp_path)
