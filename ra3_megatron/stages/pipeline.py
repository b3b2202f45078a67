"""The main job: the stages of an arm, in order, each skipped when it is done.

`ntp`: import the base model (when there is one) → prepare the corpus → train → export to Hugging Face → report.
"""

import json
import logging
import shutil
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ra3_megatron.checkpoint.convert import export_hf, import_hf
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.data import DataConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.data.filters import CorpusReport
from ra3_megatron.data.prepare import PreparedCorpus, open_prepared, prepare, prepare_tokenizer
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.model.factory import choose_layers
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.parallel.launch import launch_from_env
from ra3_megatron.report.run_report import build_report
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.dry_run import declared_architecture
from ra3_megatron.stages.run_folder import RunFolder, StageFolder
from ra3_megatron.stages.sft import SftInputs, run_sft


def run(config: RunConfig, accept_changes: bool = False) -> Path:
    """Run or go on with the run in `run.dir`; returns the path of its report.

    Everything that can be refused is refused before a process group or a file is made.
    """
    launch = launch_from_env()
    architecture, _ = declared_architecture(config)
    if config.model.source is not None and not Path(config.model.source).exists():
        raise UserError(
            f"no base model at model.source {config.model.source}; download it there (a Hugging Face folder or a GGUF "
            "file), or leave model.source out to start from random weights"
        )
    layout = resolve_layout(config, launch.world, architecture)
    choose_layers(config.model)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # Megatron's advice to its callers about deprecated and experimental parts is nothing a user could follow.
    logging.getLogger("megatron.core.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    with initialize(config.parallel, launch) as parallel, ExitStack() as held:
        context = Context(config, architecture, layout, parallel, RunFolder(Path(config.run.dir)))

        def claim() -> None:
            held.enter_context(context.folder.locked())
            context.folder.claim(config, accept_changes)

        context.on_main("configuration", claim)
        return _run_ntp(context)


def _run_ntp(context: Context) -> Path:
    folder, config = context.folder, context.config
    names = ["import"] if config.model.source else []
    names += ["prepare", "ntp", "export"]
    stages = {name: folder.stage(number, name) for number, name in enumerate(names)}
    if "import" in stages:
        context.run_once(stages["import"], "import", lambda s: _import(context, s))
    corpus, hf_folder = _prepared(context, stages["prepare"], stages.get("import"))
    weights = stages["import"].path / "checkpoint" if "import" in stages else None
    trained = run_sft(context, stages["ntp"], SftInputs(corpus, hf_folder, weights))
    exported = None
    if config.export.enabled:
        exported = context.run_once(stages["export"], "export", lambda s: _export(context, s, trained))
    report = context.on_main("report", lambda: build_report(folder.path))
    _say_results(context, trained, exported, report)
    return report


def _import(context: Context, stage: StageFolder) -> dict[str, Any]:
    source = context.config.model.source
    assert source is not None
    report = import_hf(source, stage.path / "checkpoint")
    context.say(str(report))
    return {"checkpoint": "checkpoint", "source": source, "parameters_sha256": report.parameters_sha256}


def _prepared(context: Context, stage: StageFolder, imported: StageFolder | None) -> tuple[PreparedCorpus, Path]:
    """The corpus, opened on every process, and the folder with config.json and tokenizer."""
    config = context.config
    data = _with_own_tokenizer(config.data, imported)

    def make(stage: StageFolder) -> dict[str, Any]:
        tokenizer = prepare_tokenizer(data, stage.path / "data" / "tokenizer")
        tokenizer.check_fits(context.architecture.vocab_size)
        context.say(f"corpus: {data.corpus.kind}, tokenizer of {tokenizer.vocab_size} entries; reading ...")
        corpus = prepare(data, tokenizer, config.train.seq_length, stage.path / "data" / "corpus", _Told(context))
        _write_hf_folder(stage.path / "hf", tokenizer, context.architecture, imported)
        return {"fingerprint": corpus.fingerprint, "counts": corpus.report.to_json()}

    result = context.run_once(stage, "prepare", make)
    counts = result["counts"]
    context.say(f"corpus: {counts['kept']:,} of {counts['read']:,} documents, {counts['tokens']:,} tokens")
    return open_prepared(stage.path / "data" / "corpus"), stage.path / "hf"


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


def _export(context: Context, stage: StageFolder, trained: dict[str, Any]) -> dict[str, Any]:
    e = context.config.export
    checkpoint = context.folder.path / trained["checkpoint"]
    report = export_hf(checkpoint, stage.path / "hf", dtype=e.dtype, max_shard_gb=e.max_shard_gb)
    context.say(str(report))
    return {"hf": "hf", "dtype": e.dtype, "checkpoint": trained["checkpoint"]}


def _say_results(context: Context, trained: dict[str, Any], exported: dict[str, Any] | None, report: Path) -> None:
    path = context.folder.path
    lines = ["", f"done: {trained['step']} steps, {trained['tokens']:,} tokens"]
    if "validation_loss" in trained:
        before, after = trained["validation_loss_before"], trained["validation_loss"]
        lines.append(f"  validation loss  {before:.4f} -> {after:.4f} nats per token")
    lines.append(f"  checkpoint       {path / trained['checkpoint']}")
    if exported is not None:
        lines.append(f"  Hugging Face     {next(path.glob('*-export')) / exported['hf']}")
    lines.append(f"  report           {report}")
    context.say("\n".join(lines))
