"""Everything a user can get wrong: refused with one line that says what, what was found and the cure, before training.

All cases go through the command's own `main` in forked processes; one of each kind also through a fresh interpreter.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e import small
from tests.e2e.forked import ROOT, Ended

Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One mistake: `spoil(folder, config, hf)` makes it; the error names all `words`."""

    name: str
    spoil: Callable[[Path, Config, Path], None]
    words: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def use_model(folder: Path, config: Config, hf: Path) -> Path:
    """Point `config` at a private copy of a good model folder and its tokenizer."""
    copy = folder / "model"
    shutil.copytree(hf, copy)
    config["model"] = {"source": str(copy), "vocab_multiple": 8}
    config["data"]["tokenizer"] = {"kind": "hf"}
    return copy


def missing_model(folder: Path, config: Config, hf: Path) -> None:
    config["model"]["source"] = str(folder / "nowhere")


def empty_model_folder(folder: Path, config: Config, hf: Path) -> None:
    config["model"] = {"source": str(folder / "model")}
    (folder / "model").mkdir()


def truncated_weights(folder: Path, config: Config, hf: Path) -> None:
    weights = use_model(folder, config, hf) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def garbage_weights(folder: Path, config: Config, hf: Path) -> None:
    (use_model(folder, config, hf) / "model.safetensors").write_bytes(b"\xff" * 4096)


def no_weights(folder: Path, config: Config, hf: Path) -> None:
    (use_model(folder, config, hf) / "model.safetensors").unlink()


def garbage_model_config(folder: Path, config: Config, hf: Path) -> None:
    (use_model(folder, config, hf) / "config.json").write_text("{not json")


def list_model_config(folder: Path, config: Config, hf: Path) -> None:
    (use_model(folder, config, hf) / "config.json").write_text("[1, 2]")


def wrongly_typed_model_config(folder: Path, config: Config, hf: Path) -> None:
    path = use_model(folder, config, hf) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))


def model_config_of_another_shape(folder: Path, config: Config, hf: Path) -> None:
    path = use_model(folder, config, hf) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))


def missing_shard(folder: Path, config: Config, hf: Path) -> None:
    model = use_model(folder, config, hf)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def garbage_index(folder: Path, config: Config, hf: Path) -> None:
    (use_model(folder, config, hf) / "model.safetensors.index.json").write_text("[]")


def poisoned_weights(folder: Path, config: Config, hf: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = use_model(folder, config, hf) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def garbage_gguf(folder: Path, config: Config, hf: Path) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\x07" * 500)
    config["model"] = {"source": str(folder / "model.gguf")}


def empty_gguf(folder: Path, config: Config, hf: Path) -> None:
    (folder / "model.gguf").touch()
    config["model"] = {"source": str(folder / "model.gguf")}


def large_tokenizer(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["tokenizer"]["vocab_size"] = 600


def tokenizer_folder_without_files(folder: Path, config: Config, hf: Path) -> None:
    (folder / "tokenizer").mkdir()
    config["data"]["tokenizer"] = {"kind": "hf", "path": str(folder / "tokenizer")}


def model_without_tokenizer(folder: Path, config: Config, hf: Path) -> None:
    model = use_model(folder, config, hf)
    for path in model.glob("tokenizer*"):
        path.unlink()


def garbage_tokenizer(folder: Path, config: Config, hf: Path) -> None:
    (use_model(folder, config, hf) / "tokenizer.json").write_text("{}")


def own_tokenizer_without_model(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["tokenizer"] = {"kind": "hf"}


def missing_sentencepiece(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["tokenizer"] = {"kind": "sentencepiece", "path": str(folder / "none.model")}


def garbage_sentencepiece(folder: Path, config: Config, hf: Path) -> None:
    (folder / "bad.model").write_bytes(b"\xff\xfe" * 50)
    config["data"]["tokenizer"] = {"kind": "sentencepiece", "path": str(folder / "bad.model")}


def corpus(folder: Path, config: Config, **files: str | bytes) -> Path:
    """Replace the corpus by `files`."""
    code = folder / "other"
    code.mkdir()
    for name, text in files.items():
        (code / f"{name}.py").write_bytes(text.encode() if isinstance(text, str) else text)
    config["data"]["corpus"] = {"kind": "folder", "path": str(code)}
    return code


def missing_corpus(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["corpus"]["path"] = str(folder / "nowhere")


def empty_corpus(folder: Path, config: Config, hf: Path) -> None:
    corpus(folder, config)


def corpus_without_code(folder: Path, config: Config, hf: Path) -> None:
    corpus(folder, config, a="def broken(:\n", b="class (:\n  x\n" * 9)


def corpus_all_too_short(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["filters"] = {"min_tokens": 10_000_000}


def empty_files(folder: Path, config: Config, hf: Path) -> None:
    corpus(folder, config, a="", b="\n\n")


def long_snippet(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["long_snippets"] = "error"


def missing_parquet(folder: Path, config: Config, hf: Path) -> None:
    config["data"]["corpus"] = {"kind": "datasets", "files": [str(folder / "*.parquet")]}


def wrong_column(folder: Path, config: Config, hf: Path) -> None:
    (folder / "rows.jsonl").write_text('{"code": "x = 1"}\n')
    config["data"]["corpus"] = {"kind": "datasets", "files": [str(folder / "rows.jsonl")]}


def garbage_parquet(folder: Path, config: Config, hf: Path) -> None:
    (folder / "rows.parquet").write_bytes(b"PAR1" + b"\0" * 99)
    config["data"]["corpus"] = {"kind": "datasets", "files": [str(folder / "rows.parquet")]}


def nothing(folder: Path, config: Config, hf: Path) -> None:
    pass


def misspelt(folder: Path, config: Config, hf: Path) -> None:
    config["train"]["micro_batch"] = 2


def run_folder_is_a_file(folder: Path, config: Config, hf: Path) -> None:
    (folder / "run").write_text("occupied")


CASES = [
    Case("missing model folder", missing_model, ("model.source", "nowhere", "download")),
    Case("empty model folder", empty_model_folder, ("config.json", "does not exist")),
    Case("truncated safetensors", truncated_weights, ("model.safetensors", "corrupt or truncated", "copy")),
    Case("garbage safetensors", garbage_weights, ("model.safetensors", "corrupt or truncated", "copy")),
    Case("no weights", no_weights, ("no weights", "model.safetensors")),
    Case("config.json garbage", garbage_model_config, ("config.json", "not valid JSON", "copy")),
    Case("config.json a list", list_model_config, ("config.json",)),
    Case("config.json with a word for a number", wrongly_typed_model_config, ("config.json", "hidden_size", "wide")),
    Case("config.json of another shape", model_config_of_another_shape, ("96",)),
    Case("missing shard", missing_shard, ("1 of 2", "model-00002-of-00002.safetensors", "copy")),
    Case("index garbage", garbage_index, ("index.json", "copy")),
    Case("NaN among the weights", poisoned_weights, ("not finite", "final_layernorm")),
    Case("GGUF garbage", garbage_gguf, ("model.gguf", "not a complete GGUF", "copy")),
    Case("GGUF empty", empty_gguf, ("model.gguf", "0 bytes")),
    Case("tokenizer larger than the model", large_tokenizer, ("600", "517", "tokenizer")),
    Case("tokenizer folder empty", tokenizer_folder_without_files, ("tokenizer", "tokenizer.json")),
    Case("model without tokenizer", model_without_tokenizer, ("tokenizer", "tokenizer.json")),
    Case("tokenizer.json garbage", garbage_tokenizer, ("tokenizer",)),
    Case("no tokenizer named", own_tokenizer_without_model, ("data.tokenizer.path", "train_bpe")),
    Case("sentencepiece missing", missing_sentencepiece, ("none.model", ".model file")),
    Case("sentencepiece garbage", garbage_sentencepiece, ("SentencePiece", ".model file")),
    Case("missing corpus folder", missing_corpus, ("nowhere", "no such folder", "corpus.path")),
    Case("empty corpus folder", empty_corpus, ("other", "no documents", "check path")),
    Case("corpus that does not parse", corpus_without_code, ("no training document", "2 read")),
    Case("corpus all filtered out", corpus_all_too_short, ("no training document", "11", "data.filters")),
    Case("corpus of empty files", empty_files, ("no training document",)),
    Case("snippet longer than the window", long_snippet, ("tokens", "127", "data.long_snippets")),
    Case("no parquet files", missing_parquet, ("no file matches", "corpus.files")),
    Case("data set without the column", wrong_column, ("content", "code", "corpus.text_field")),
    Case("parquet garbage", garbage_parquet, ("rows.parquet",)),
    Case("misspelt key", misspelt, ("train.micro_batch", "micro_batch_size")),
    Case("value of the wrong type", nothing, ("train.steps", "many"), ("train.steps=many",)),
    Case("override without a value", nothing, ("train.steps", "section.field=value"), ("train.steps",)),
    Case("no length", nothing, ("train.steps", "train.tokens"), ("train.steps=null",)),
    Case("window longer than the model's positions", nothing, ("1024", "512"), ("train.seq_length=1024",)),
    Case("FP8 without Transformer Engine", nothing, ("fp8", "layers"), ("model.precision=fp8", "model.layers=local")),
    Case("too few processes", nothing, ("parallel.tensor", "torchrun"), ("parallel.tensor=2",)),
    Case("other number of replicas", nothing, ("parallel.data", "2"), ("parallel.data=2",)),
    Case("warm-up longer than the run", nothing, ("warmup_steps", "24"), ("optimizer.warmup_steps=24",)),
    Case(
        "no file of tasks, needed after the arms",
        nothing,
        ("rlvr.tasks", "nowhere.jsonl"),
        ("rlvr.steps=1", "rlvr.tasks=nowhere.jsonl"),
    ),
    Case(
        "no data of a benchmark, needed at the very end",
        nothing,
        ("evaluation.data_dir", "humaneval", "no such"),
        ("evaluation.benchmarks=[humaneval]", "evaluation.data_dir=nowhere"),
    ),
    Case("run folder is a file", run_folder_is_a_file, ("run",)),
]


def make(folder: Path, case: Case, hf: Path) -> list[str]:
    """Arguments of the command for a case in `folder`."""
    config = small.config(folder)
    case.spoil(folder, config, hf)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["midtrain", str(path), *case.overrides]


def check_refused(code: int, err: str, words: tuple[str, ...], run: Path) -> None:
    assert code == 2, err[-3000:]
    lines = err.strip().splitlines()
    assert len(lines) == 1, f"more than one line on standard error: {err[-3000:]}"
    assert lines[0].startswith("error: ")
    for word in words:
        assert word.lower() in lines[0].lower(), f"{word!r} is not in: {lines[0]}"
    assert not list(run.glob("*/checkpoints")), "training was started"
    assert not list(run.glob("*/metrics.jsonl")), "training was started"


def check(ended: Ended, words: tuple[str, ...], run: Path) -> None:
    check_refused(ended.code, ended.err, words, run)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mistake_is_refused_before_training(case, server, base, tmp_path):
    """A traceback, a second line, a vague word, or an hour of work before the refusal (verl#1029)."""
    arguments = make(tmp_path, case, base / "run" / "02-export" / "hf")
    (ended,) = server.cli(arguments)
    check(ended, case.words, tmp_path / "run")


@pytest.mark.parametrize("name", ["misspelt key", "missing model folder", "corpus that does not parse"])
def test_a_fresh_interpreter_says_the_same(name, base, tmp_path):
    """Imports, loggers and warnings of a real start may print lines of their own."""
    (case,) = [c for c in CASES if c.name == name]
    arguments = make(tmp_path, case, base / "run" / "02-export" / "hf")
    done = subprocess.run(
        [sys.executable, "-m", "ra3_megatron", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    # torch says, where a CUDA toolkit is installed but no GPU is there, that it found the one and not the other.
    err = "\n".join(line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line)
    check_refused(done.returncode, err, case.words, tmp_path / "run")


def test_world_that_does_not_fit(server, tmp_path):
    """Two processes for tensor 4: rank 0 says it, the others do not hang or repeat it at once."""
    arguments = make(tmp_path, Case("", nothing, ()), tmp_path)
    zero, one = server.cli([*arguments, "parallel.tensor=4"], world=2, timeout=60)
    check(zero, ("parallel.tensor 4", "2 ", "torchrun"), tmp_path / "run")
    assert one.code == 2
    assert one.err.startswith("error (rank 1): ")


def test_an_error_of_one_rank_reaches_all(server, tmp_path):
    """Rank 0 prepares for everybody: when it fails, the others waited for a day (parallel.setup_timeout_s)."""
    arguments = make(tmp_path, Case("", empty_corpus, ()), tmp_path)
    zero, one = server.cli([*arguments, "parallel.tensor=2"], world=2, timeout=60)
    check(zero, ("no documents",), tmp_path / "run")
    assert one.code == 2
    assert "no documents" in one.err
    assert "Traceback" not in one.err


def test_invalid_bytes_are_counted_and_dropped(server, base, tmp_path):
    """One file in Latin-1 must neither end the run nor vanish without a word."""
    config = small.config(tmp_path, train={"steps": 3, "eval_interval": 0})
    (tmp_path / "code" / "latin.py").write_bytes("# coding: utf-8\nname = 'Größe'\n".encode("latin-1") * 30)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    (ended,) = server.cli(["midtrain", str(path)])
    assert ended.code == 0, ended.err[-3000:]
    counts = json.loads((tmp_path / "run" / "00-prepare" / "DONE").read_text())["counts"]
    assert (counts["read"], counts["kept"]) == (12, 11)
    assert [reason["count"] for reason in counts["dropped"].values()] == [1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_named(server, tmp_path):
    """Permissions of a shared file system."""

    def spoil(folder: Path, config: Config, hf: Path) -> None:
        corpus(folder, config, a="x = 1\n" * 50).joinpath("a.py").chmod(0)

    arguments = make(tmp_path, Case("", spoil, ()), tmp_path)
    (ended,) = server.cli(arguments)
    check(ended, ("a.py", "permission"), tmp_path / "run")


def test_a_mistake_that_is_cured_does_not_stand_in_the_way(server, tmp_path):
    """The configuration of the failed try was taken for that of a run, and the cure refused as a change."""
    arguments = make(tmp_path, Case("", missing_corpus, ()), tmp_path)
    (failed,) = server.cli(arguments)
    check(failed, ("no such folder",), tmp_path / "run")
    small.write_config(tmp_path, train={"steps": 3, "eval_interval": 0})
    (cured,) = server.cli(arguments)
    assert cured.code == 0, cured.err[-3000:]
