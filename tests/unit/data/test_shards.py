"""Shards: the plan, and what is found again after a crash or damage."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ra3_megatron.config.data import CorpusConfig, DataConfig, FilterConfig, TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.infused import InfusedSnippet, Provenance, infused_table
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.licenses import LICENSES_FILE, LicenseReader, license_line
from ra3_megatron.data.prepare import prepare
from ra3_megatron.data.shards import Shard, ShardContent, ShardFolder, plan_shards
from ra3_megatron.data.store import TrajectoryStore, TrajectoryWriter, to_columns
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.data.trajectory import Trajectory, TrajectoryBuilder, splice

PROVENANCE = Provenance("run", "04-ra3-generate-1", 1, "f00d", "cafe")


def made(tokenizer: Tokenizer) -> tuple[list[Trajectory], ThinkTokens]:
    """Three snippets, the second with a thought."""
    think_tokens = ThinkTokens(tokenizer)
    builder = TrajectoryBuilder(tokenizer, think_tokens, tokenizer.start_id("auto"))
    found = [builder.build(f"def f{i}(x):\n    return x + {i}\n", name=f"file{i}.py") for i in range(3)]
    found[1] = splice(found[1], {1: tokenizer.encode("    # add it\n")})
    return found, think_tokens


def content(trajectories: list[Trajectory], think_tokens: ThinkTokens, start: int) -> ShardContent:
    snippets = [
        InfusedSnippet(start + i, t, np.linspace(0.1, 0.9, len(t.decisions)), -np.ones(t.num_lines))
        for i, t in enumerate(trajectories)
    ]
    table = infused_table(snippets, think_tokens, PROVENANCE)
    return ShardContent(to_columns(trajectories, think_tokens), table, {"snippets": len(snippets)})


def test_plan_covers_every_snippet_once_with_equal_tokens() -> None:
    """A snippet in two shards or in none; one shard with all the long ones."""
    lengths = {"train": np.r_[np.full(500, 10), np.full(500, 90)], "validation": np.full(7, 50)}
    plan = plan_shards(lengths, 100)
    assert [s.number for s in plan] == list(range(len(plan)))
    for part, count in (("train", 1000), ("validation", 7)):
        covered = [i for s in plan if s.part == part for i in range(s.start, s.end)]
        assert covered == list(range(count))
    tokens = [lengths[s.part][s.start : s.end].sum() for s in plan if s.part == "train"]
    assert len(tokens) == 10
    assert max(tokens) - min(tokens) <= 2 * 90
    assert plan_shards({"train": np.array([9]), "validation": np.zeros(0, np.int64)}, 4) == [Shard(0, "train", 0, 1)]


def test_what_was_written_comes_back(tmp_path: Path, bpe: Tokenizer) -> None:
    """Ids, decisions and numbers pass through a shard into a store unchanged."""
    trajectories, think_tokens = made(bpe)
    folder, shard = ShardFolder(tmp_path / "shards", "key"), Shard(3, "train", 5, 8)
    folder.write(shard, content(trajectories, think_tokens, 5))
    assert folder.finished([shard]) == [3]
    found = folder.read(shard)
    with TrajectoryWriter(tmp_path / "store", think_tokens) as writer:
        writer.append_columns(found.columns)
    for before, after in zip(trajectories, TrajectoryStore(tmp_path / "store", think_tokens), strict=True):
        np.testing.assert_array_equal(before.ids, after.ids)
        assert before.decisions == after.decisions
        assert before.segments == after.segments
    rows = found.table.to_pylist()
    assert [row["snippet"] for row in rows] == [5, 6, 7]
    thought = {"line": 1, "text": "add it", "p_think": rows[1]["p_think"][rows[1]["decision_lines"].index(1)]}
    assert rows[1]["thoughts"] == [thought]
    assert rows[1]["code"] == "def f1(x):\n    # add it\n    return x + 1\n"
    assert rows[1]["expert"] == "def f1(x):\n    return x + 1\n"
    assert rows[1]["provenance"] == vars(PROVENANCE)


@pytest.mark.parametrize("damage", ["npz", "parquet", "missing", "other key", "other snippets"])
def test_damaged_and_foreign_shards_are_made_again(damage: str, tmp_path: Path, bpe: Tokenizer) -> None:
    """Half a shard, or one of other weights, went into the corpus."""
    trajectories, think_tokens = made(bpe)
    folder, shard = ShardFolder(tmp_path, "key"), Shard(0, "train", 0, 3)
    folder.write(shard, content(trajectories, think_tokens, 0))
    if damage in ("npz", "parquet"):
        (path,) = tmp_path.glob(f"*.{damage}")
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "missing":
        next(tmp_path.glob("*.npz")).unlink()
    elif damage == "other key":
        folder = ShardFolder(tmp_path, "another")
    else:
        shard = replace(shard, end=2)
    (tmp_path / ".shard-000001.npz.99.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="shard 0"):
        folder.read(shard)
    assert folder.finished([shard]) == []
    assert not list(tmp_path.glob("*.json"))
    assert not list(tmp_path.glob(".*.tmp"))


def test_shards_of_other_jobs_are_left_alone(tmp_path: Path, bpe: Tokenizer) -> None:
    """An element of an array that started late deleted what the others had made, and were just writing."""
    trajectories, think_tokens = made(bpe)
    folder, shards = ShardFolder(tmp_path, "key"), [Shard(i, "train", 3 * i, 3 * i + 3) for i in range(2)]
    for shard in shards:
        folder.write(shard, content(trajectories, think_tokens, shard.start))
    writing, leftover = tmp_path / ".shard-000001.npz.7.tmp", tmp_path / ".shard-000000.npz.7.tmp"
    writing.touch()
    leftover.touch()
    assert folder.finished(shards[:1], alone=False) == [0]
    assert writing.exists()
    assert not leftover.exists()
    assert folder.finished(shards) == [0, 1]
    assert not writing.exists()
    assert folder.finished(shards[:1]) == [0]
    assert folder.count() == 1, "alone, what is not asked for is a leftover"


def test_licenses_are_read_along(tmp_path: Path) -> None:
    """Pieces of one document share a line; a document of the other part lies in between."""
    assert not LicenseReader(tmp_path).known
    lines = [license_line("a", ["mit"]), license_line("b", []), license_line("c", ["bsd", "mit"])]
    (tmp_path / LICENSES_FILE).write_text("".join(lines))
    reader = LicenseReader(tmp_path)
    assert [reader.of(name) for name in ("a", "a", "c")] == [["mit"], ["mit"], ["bsd", "mit"]]
    with pytest.raises(UserError, match="no line for b"):
        reader.of("b")


def test_preparation_leaves_the_licenses(tmp_path: Path, bpe: Tokenizer) -> None:
    """The dataset could not say under which licence a snippet stands; dropped documents must leave no gap."""
    rows = [{"content": f"def f{i}(x):\n    return x + {i}\n", "lic": ["MIT", f"own-{i}"]} for i in range(8)]
    rows.insert(3, {"content": "print 'two'\n" * 9, "lic": ["MIT"]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = CorpusConfig("datasets", str(tmp_path), ("a.jsonl",), license_field="lic")
    config = DataConfig(source, TokenizerConfig("train_bpe"), FilterConfig(min_tokens=1), validation_fraction=0.3)
    corpus = prepare(replace(config, workers=1), bpe, 128, tmp_path / "corpus")
    assert len(corpus.validation), "both parts, or the order is not tested"
    found = []
    for store in (corpus.train, corpus.validation):
        reader = LicenseReader(corpus.folder)
        for t in store:
            number = bpe.decode(t.ids).removeprefix("def f")[0]
            assert reader.of(t.name) == ["mit", f"own-{number}"]
            found.append(number)
    assert sorted(found) == [str(i) for i in range(8)]
    plain = replace(config, corpus=replace(source, license_field=None), workers=1)
    assert not LicenseReader(prepare(plain, bpe, 128, tmp_path / "plain").folder).known
