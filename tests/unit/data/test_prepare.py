"""Corpus readers, filters, decontamination and preparation."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ra3_megatron.config.data import CorpusConfig, DataConfig, DecontaminationConfig, FilterConfig, TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.corpus import read_corpus
from ra3_megatron.data.decontaminate import NgramIndex
from ra3_megatron.data.prepare import prepare, prepare_tokenizer
from ra3_megatron.data.tokenizers import Tokenizer

from .conftest import SHARED


def function(name: str, number: int = 1) -> str:
    return f"def {name}(value):\n    # a comment\n    total = value + {number}\n    return [total, {name}.__name__]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "code"
    (root / "sub").mkdir(parents=True)
    for i in range(30):
        (root / "sub" / f"m{i}.py").write_text(function(f"function_{i}", i))
    return root


def config_for(folder: Path, **changes: object) -> DataConfig:
    base = DataConfig(CorpusConfig("folder", str(folder)), TokenizerConfig("train_bpe"), workers=1)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_result_does_not_depend_on_processes_and_is_reused(folder: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    config = config_for(folder, validation_fraction=0.3)
    one = prepare(config, bpe, 128, tmp_path / "one")
    two = prepare(replace(config, workers=2), bpe, 128, tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    assert 0 < len(one.validation) < len(one.train)
    again = prepare(config, bpe, 128, tmp_path / "one")
    assert again.reused
    assert again.report == one.report
    assert not prepare(config, bpe, 96, tmp_path / "one").reused
    (folder / "sub" / "m0.py").write_text(function("changed"))
    assert prepare(config, bpe, 128, tmp_path / "two").fingerprint != two.fingerprint


def test_validation_goes_by_content(folder: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    """A limit or another order must not move documents from validation to training."""
    few = config_for(folder, validation_fraction=0.3)
    few = replace(few, corpus=replace(few.corpus, limit=15))
    small = prepare(few, bpe, 128, tmp_path / "a")
    full = prepare(config_for(folder, validation_fraction=0.3), bpe, 128, tmp_path / "b")
    names = [{t.name for t in store} for store in (small.train, small.validation, full.train, full.validation)]
    assert names[0] < names[2]
    assert names[1] <= names[3]
    assert len(names[0]) + len(names[1]) == 15


def test_every_drop_has_its_reason(folder: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    """One document per reason; none may crash the preparation."""
    (folder / "syntax.py").write_text("print 'two'\n" * 9)
    (folder / "bytes.py").write_bytes(b"x = '\xff\xfe'\n" * 9)
    (folder / "nul.py").write_bytes(b"x = 1\0\n" * 9)
    (folder / "empty.py").write_text("# only a comment\n")
    (folder / "short.py").write_text("x = 1\n")
    (folder / "same.py").write_text(function("function_3", 3))
    (folder / "long.py").write_text("".join(f"variable_{i} = {i} * {i}\n" for i in range(400)))
    words = " ".join(f"word{chr(97 + i)}" for i in range(20))
    (folder / "task.py").write_text(f'def solved():\n    """{words}"""\n    return 1\n')
    (folder / "table.py").write_text(f"table = [{', '.join(map(str, range(500)))}]\n")
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"task_id": 1, "text": f"please {words} now", "code": "x"}))
    config = config_for(
        folder,
        filters=FilterConfig(max_tokens=3000),
        decontamination=DecontaminationConfig(benchmarks=(str(tmp_path / "tasks.jsonl"),)),
        validation_fraction=0.0,
    )
    result = prepare(config, bpe, 256, tmp_path / "out")
    report = result.report
    assert {k: v for k, v in report.dropped.items() if v} == {
        "syntax": 2, "undecodable": 1, "empty": 1, "too_short": 1, "exact_duplicate": 1, "too_long": 1,
        "contaminated": 1, "unsplittable": 1,
    }  # fmt: skip
    assert report.read == report.kept + sum(report.dropped.values()) == 39
    assert report.pieces == len(result.train)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]["syntax"]["count"] == 2
    kept = prepare(replace(config, comments="keep_as_action"), bpe, 256, tmp_path / "kept")
    assert "# a comment" in bpe.decode(kept.train[0].ids)
    assert "# a comment" not in bpe.decode(result.train[0].ids)


def test_near_duplicates(folder: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    body = "".join(f"    step_{i} = compute(value_{i}, other_{i * 7}) + {i}\n" for i in range(60))
    (folder / "near1.py").write_text(f"def first():\n{body}")
    (folder / "near2.py").write_text(f"def second():\n{body}")
    config = config_for(folder, filters=FilterConfig(near_duplicates=True, near_duplicate_threshold=0.8))
    report = prepare(config, bpe, 4096, tmp_path / "out").report
    assert report.dropped["near_duplicate"] == 1
    assert report.kept == 31


def test_long_snippets(folder: Path, tmp_path: Path, bpe: Tokenizer) -> None:
    (folder / "long.py").write_text("".join(f"variable_{i} = {i} * {i}\n" for i in range(40)))
    with pytest.raises(UserError, match=r"long.py has \d+ tokens; a sequence holds 127"):
        prepare(config_for(folder, long_snippets="error"), bpe, 128, tmp_path / "a")
    assert prepare(config_for(folder, long_snippets="drop"), bpe, 128, tmp_path / "b").report.dropped["too_long"] == 1
    split = prepare(config_for(folder), bpe, 128, tmp_path / "c")
    assert split.report.pieces > split.report.kept
    assert max(split.train.lengths) <= 127
    last = [t for t in split.train if t.name == "long.py" and t.ends_document]
    assert len(last) <= 1


def test_local_data_sets(tmp_path: Path) -> None:
    """parquet, jsonl and arrow read alike; a missing column, file or mixture says what to change."""
    import datasets

    rows = [{"content": function(f"f{i}"), "lic": ["MIT"] if i % 2 else "GPL-3.0", "n": i} for i in range(6)]
    rows = [{**r, "lic": r["lic"] if isinstance(r["lic"], list) else [r["lic"]]} for r in rows]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for files in ("a.parquet", "a.jsonl", "saved/*.arrow"):
        for streaming in (False, True):
            config = CorpusConfig("datasets", str(tmp_path), (files,), streaming=streaming, license_field="lic")
            documents = list(read_corpus(config))
            assert [d.code for d in documents] == [r["content"] for r in rows]
            assert documents[1].licenses == ("mit",)
    with pytest.raises(UserError, match="no column 'text'; it has content, lic, n"):
        list(read_corpus(CorpusConfig("datasets", str(tmp_path), ("a.jsonl",), text_field="text")))
    with pytest.raises(UserError, match="holds int"):
        list(read_corpus(CorpusConfig("datasets", str(tmp_path), ("a.jsonl",), text_field="n")))
    with pytest.raises(UserError, match="no file matches"):
        list(read_corpus(CorpusConfig("datasets", str(tmp_path), ("b.*",))))
    with pytest.raises(UserError, match="one kind"):
        list(read_corpus(CorpusConfig("datasets", str(tmp_path), ("a.*",))))


def test_licenses(tmp_path: Path, bpe: Tokenizer) -> None:
    rows = [{"content": function(f"f{i}"), "lic": "MIT" if i % 2 else "GPL-3.0"} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    corpus = CorpusConfig("datasets", str(tmp_path), ("a.jsonl",), license_field="lic", allowed_licenses=("MIT",))
    report = prepare(
        DataConfig(corpus, workers=1, tokenizer=TokenizerConfig("train_bpe")), bpe, 128, tmp_path / "o"
    ).report
    assert (report.kept, report.dropped["license"]) == (3, 3)


def test_sources_that_give_nothing(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(read_corpus(CorpusConfig("folder", str(tmp_path / "none"))))
    with pytest.raises(UserError, match="no documents"):
        list(read_corpus(CorpusConfig("folder", str(tmp_path))))
    (tmp_path / "a.py").write_text("print 'two'\n")
    with pytest.raises(UserError, match="1 does not parse"):
        prepare(config_for(tmp_path), bpe, 128, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_standard_library_and_its_limits() -> None:
    full = CorpusConfig(limit_bytes=200_000)
    documents = list(read_corpus(full))
    assert 200_000 <= sum(len(d.code) for d in documents) < 800_000
    assert not any("test/" in d.name or "site-packages" in d.name for d in documents)
    assert [d.name for d in read_corpus(CorpusConfig(limit=5))] == [d.name for d in documents[:5]]


def test_numbers_and_short_matches_are_no_contamination(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    task = {"prompt": "def solve(items): return the largest of all items given here", "test": "", "code": "1 " * 40}
    path.write_bytes(gzip.compress((json.dumps(task) + "\n").encode()))
    index = NgramIndex.from_files([path], 8)
    assert index.contains_any("x = 1\n# Def SOLVE(items):\n#   return the largest, of all items\n")
    assert not index.contains_any("def solve(items): return the largest of none")
    assert not index.contains_any("[" + "1, " * 40 + "]")
    assert NgramIndex(8, index.hashes).contains_any("def solve items return the largest of all")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        NgramIndex.from_files([tmp_path / "bad.jsonl"], 8)
    with pytest.raises(UserError, match="does not exist"):
        NgramIndex.from_files([tmp_path / "none.jsonl"], 8)
    (tmp_path / "other.jsonl").write_text('{"a": 1}')
    with pytest.raises(UserError, match="none of the fields"):
        NgramIndex.from_files([tmp_path / "other.jsonl"], 8)


def test_real_benchmarks_find_themselves() -> None:
    """Nearly every HumanEval and MBPP solution with its task text must count as contaminated."""
    names = ("humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl", "mbpp/sanitized-mbpp.json")
    files = [SHARED / "data" / name for name in names]
    if not all(f.is_file() for f in files):
        pytest.skip("the benchmark files are not beside the project")
    from ra3_megatron.data.decontaminate import read_tasks

    index = NgramIndex.from_files(files, 10)
    found = []
    for path in files[:2]:
        for row in read_tasks(path):
            found.append(index.contains_any(row.get("prompt", "") + row.get("text", "") + "\n" + row.get("code", "")))  # noqa: PERF401
    assert len(found) == 164 + 974
    assert np.mean(found) > 0.98


def test_trained_tokenizer_is_found_again(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, tokenizer=TokenizerConfig("train_bpe", vocab_size=300))
    one = prepare_tokenizer(config, tmp_path / "t")
    stamp = (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns
    assert prepare_tokenizer(config, tmp_path / "t").fingerprint == one.fingerprint
    assert (tmp_path / "t" / "tokenizer.json").stat().st_mtime_ns == stamp
    larger = replace(config, tokenizer=TokenizerConfig("train_bpe", vocab_size=290))
    assert prepare_tokenizer(larger, tmp_path / "t").vocab_size == 290


def test_config_refuses_what_cannot_be() -> None:
    for make, message in (
        (lambda: CorpusConfig("folder"), "corpus.path"),
        (lambda: CorpusConfig("datasets"), "corpus.files"),
        (lambda: CorpusConfig(allowed_licenses=("mit",)), "license_field"),
        (lambda: CorpusConfig("hub"), "known values"),  # type: ignore[arg-type]
        (lambda: TokenizerConfig("sentencepiece"), "tokenizer.path"),
        (lambda: FilterConfig(near_duplicate_threshold=0), "similarity"),
        (lambda: DataConfig(validation_fraction=1.0), "fraction"),
        (lambda: DecontaminationConfig(ngram=1), "at least 3"),
    ):
        with pytest.raises(UserError, match=message):
            make()
