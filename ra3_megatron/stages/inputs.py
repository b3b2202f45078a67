"""What comes in and goes out of a run: base model, corpus, Hugging Face folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ra3_megatron.checkpoint.convert import export_hf, import_hf
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.data import DataConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.data.filters import CorpusReport
from ra3_megatron.data.prepare import PreparedCorpus, open_prepared, prepare, prepare_tokenizer
from ra3_megatron.data.tokenizers import Tokenizer, load_folder
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import StageFolder


def import_model(context: Context, stage: StageFolder) -> dict[str, Any]:
    """Convert `model.source` to a checkpoint; returns the stage's result. On one process."""
    source = context.config.model.source
    assert source is not None
    report = import_hf(source, stage.path / "checkpoint")
    context.say(str(report))
    return {"checkpoint": "checkpoint", "source": source, "parameters_sha256": report.parameters_sha256}


def export_model(context: Context, stage: StageFolder, checkpoint: Path) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder; returns the stage's result. On one process."""
    e = context.config.export
    report = export_hf(checkpoint, stage.path / "hf", dtype=e.dtype, max_shard_gb=e.max_shard_gb)
    context.say(str(report))
    return {"hf": "hf", "dtype": e.dtype, "checkpoint": str(checkpoint.relative_to(context.folder.path))}


def prepare_corpus(context: Context, stage: StageFolder, imported: StageFolder | None) -> PreparedCorpus:
    """The corpus all arms train on, and `hf`, the folder with config.json and tokenizer; opened on every process."""
    config = context.config
    data = _with_own_tokenizer(config.data, imported)
    # A tokenizer trained here has to write comments as well, when the base model is to see them.
    vocabulary = replace(data, comments=config.base.comments) if config.base.tokens else data

    def make(stage: StageFolder) -> dict[str, Any]:
        tokenizer = prepare_tokenizer(vocabulary, stage.path / "data" / "tokenizer")
        tokenizer.check_fits(context.architecture.vocab_size)
        corpus = _make(context, stage, data, tokenizer)
        _write_hf_folder(stage.path / "hf", tokenizer, context.architecture, imported)
        return {"fingerprint": corpus.fingerprint, "counts": corpus.report.to_json()}

    return _opened(context, stage, "prepare", make)


def prepare_base(context: Context, stage: StageFolder, prepared: StageFolder) -> PreparedCorpus:
    """The corpus of the base model made here: the same documents, held-out ones too, with `base.comments`."""
    config = context.config
    data = replace(config.data, comments=config.base.comments)

    def make(stage: StageFolder) -> dict[str, Any]:
        corpus = _make(context, stage, data, load_folder(prepared.path / "data" / "tokenizer"))
        return {"fingerprint": corpus.fingerprint, "counts": corpus.report.to_json()}

    return _opened(context, stage, "prepare-base", make)


def _make(context: Context, stage: StageFolder, data: DataConfig, tokenizer: Tokenizer) -> PreparedCorpus:
    context.say(f"corpus: {data.corpus.kind}, comments {data.comments}, {tokenizer.vocab_size} token ids; reading ...")
    limit = data.snippet_tokens or context.config.train.seq_length
    latent = context.config.latent.format
    return prepare(data, tokenizer, limit, stage.path / "data" / "corpus", _Told(context), latent)


def _opened(context: Context, stage: StageFolder, name: str, make: Any) -> PreparedCorpus:
    counts = context.run_once(stage, name, make)["counts"]
    context.say(f"corpus: {counts['kept']:,} of {counts['read']:,} documents, {counts['tokens']:,} tokens")
    return open_prepared(stage.path / "data" / "corpus")


class _Told:
    """Says every so many documents how far preparation is."""

    def __init__(self, context: Context) -> None:
        self._context, self._next = context, 0

    def __call__(self, report: CorpusReport) -> None:
        if report.read >= self._next:
            self._next = report.read + max(500, report.read // 2)
            self._context.say(f"  {report.read:,} documents read, {report.tokens:,} tokens")


def _with_own_tokenizer(data: DataConfig, imported: StageFolder | None) -> DataConfig:
    """`kind: hf` without a path means the base model's own tokenizer, which the import put into its `hf` folder."""
    if data.tokenizer.kind != "hf" or data.tokenizer.path is not None:
        return data
    if imported is None:
        raise UserError(
            "data.tokenizer.kind is hf without a path and there is no model.source whose tokenizer could be used; "
            "set data.tokenizer.path, or kind train_bpe"
        )
    return replace(data, tokenizer=replace(data.tokenizer, path=str(imported.path / "checkpoint" / "hf")))


def _write_hf_folder(
    folder: Path, tokenizer: Tokenizer, architecture: Architecture, imported: StageFolder | None
) -> None:
    """config.json, generation_config.json and tokenizer of the model in training, as Hugging Face wants them."""
    tokenizer.save(folder)
    source = imported.path / "checkpoint" / "hf" if imported is not None else None
    for name in ("config.json", "generation_config.json"):
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if source is None:
        atomic_write_text(folder / "config.json", json.dumps({**architecture.to_hf(), **ids}, indent=1))
        atomic_write_text(folder / "generation_config.json", json.dumps(ids, indent=1))
