"""Hugging Face or GGUF weights → checkpoint folder, and any checkpoint folder → Hugging Face folder.

Neither direction builds a model or starts process groups: tensors pass through one at a time, so memory stays at a
few tensors (import) or one output shard (export).
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.checkpoint.hf_gguf import GGUFFile
from ra3_megatron.checkpoint.hf_io import (
    HFFolder,
    Source,
    copy_side_files,
    dtype_name,
    dtype_named,
    has_weight_files,
    write_safetensors,
)
from ra3_megatron.checkpoint.hf_mapping import EMBEDDING, LM_HEAD, Unit, check_tensors, hf_shapes, units
from ra3_megatron.checkpoint.hf_stream import ChunkToWrite, write_model
from ra3_megatron.checkpoint.manifest import ARCHITECTURE
from ra3_megatron.checkpoint.state import read_architecture
from ra3_megatron.checkpoint.weights import BackgroundSums, CheckpointModel, read_done
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_dir, is_done, write_done

EXPORT_FACTS = "ra3_export.json"
"""File in an exported folder that says which parameters it holds."""

_GB = 1_000_000_000


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote."""

    checkpoint: Path
    """The checkpoint folder."""
    architecture: Architecture
    """Shape of the model."""
    dtype: str
    """Dtype of the stored weights."""
    tensors: int
    """Tensors read from the source."""
    bytes: int
    """Size of the stored weights."""
    ignored: tuple[str, ...]
    """Tensors of the source on the explicit ignore list."""
    parameters_sha256: str
    """Layout-independent hash of the weights (see `ra3_megatron.checkpoint.hashing`)."""
    seconds: float
    """Wall time."""
    up_to_date: bool
    """Whether the checkpoint was there already and nothing was written."""

    def __str__(self) -> str:
        if self.up_to_date:
            return f"{self.checkpoint} is up to date ({self.dtype}, parameters {self.parameters_sha256[:12]})"
        ignored = f", ignored {', '.join(self.ignored)}" if self.ignored else ""
        return (
            f"imported {self.tensors} tensors ({self.bytes / _GB:.2f} GB {self.dtype}) to {self.checkpoint} "
            f"in {self.seconds:.1f} s, parameters {self.parameters_sha256[:12]}{ignored}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    """The Hugging Face folder."""
    dtype: str
    """Dtype of the weights."""
    tensors: int
    """Tensors written."""
    bytes: int
    """Size of the weights."""
    files: tuple[str, ...]
    """Weight files."""
    tokenizer: bool
    """Whether the checkpoint carried a tokenizer, and so the folder does."""
    seconds: float
    """Wall time."""
    up_to_date: bool
    """Whether the folder was there already and nothing was written."""

    def __str__(self) -> str:
        if self.up_to_date:
            return f"{self.folder} is up to date ({self.dtype})"
        without = "" if self.tokenizer else ", without a tokenizer (the checkpoint has none)"
        return (
            f"exported {self.tensors} tensors ({self.bytes / _GB:.2f} GB {self.dtype}) to {self.folder}, "
            f"{len(self.files)} file(s), in {self.seconds:.1f} s{without}"
        )


# --------------------------------------------------------------------------------------------------------- import


def open_source(source: Path | str) -> Source:
    """A Hugging Face folder or a GGUF file, with its headers checked. Raises UserError when it cannot be imported."""
    path = Path(source)
    if path.is_dir():
        return HFFolder(path)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    if path.exists():
        raise UserError(f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json")
    raise UserError(f"no model at {path}: it does not exist; download the model and give the path of its folder")


def source_architecture(source: Path | str) -> Architecture:
    """Shape of a base model, from its configuration alone: Hugging Face folder, GGUF file or checkpoint folder."""
    path = Path(source)
    if path.is_dir():
        return read_architecture(path / ARCHITECTURE) if is_done(path) else Architecture.from_folder(path)
    return open_source(path).architecture()


def import_hf(source: Path | str, out: Path | str, *, dtype: str = "source") -> ImportReport:
    """Write the weights of `source` (Hugging Face folder or GGUF file) as checkpoint folder `out`.

    `dtype` is `float32`, `bfloat16`, `float16` or `source` (as stored there). The checkpoint loads at any parallel
    sizes and into any parameter dtype. Running again with an unchanged source does nothing. Raises UserError, before
    anything is written, when files are missing or damaged or the tensors do not fit the configuration, and leaves
    nothing behind when a weight turns out not to be finite.
    """
    started = time.monotonic()
    out = Path(out)
    src = open_source(source)
    arch = src.architecture()
    stored = src.stored_dtype()
    target = stored if dtype == "source" else dtype_named(dtype)
    ignored = check_tensors(src.shapes(), arch, src.where).ignored
    _check_tied(src, ignored)
    size = sum(torch.Size(unit.rule.shape(arch)).numel() for unit in units(arch)) * target.itemsize
    facts: dict[str, Any] = {
        "kind": "import",
        "step": 0,
        "source": str(source),
        "source_fingerprint": src.fingerprint(),
        "dtype": dtype_name(target),
        "parameter_dtypes": [dtype_name(target)],
    }

    def report(sha256: str, up_to_date: bool) -> ImportReport:
        return ImportReport(
            checkpoint=out,
            architecture=arch,
            dtype=facts["dtype"],
            tensors=len(hf_shapes(arch)),
            bytes=size,
            ignored=ignored,
            parameters_sha256=sha256,
            seconds=time.monotonic() - started,
            up_to_date=up_to_date,
        )

    found = _existing_import(out)
    if found is not None and all(found.get(key) == facts[key] for key in ("source_fingerprint", "dtype")):
        return report(found["parameters_sha256"], up_to_date=True)
    _check_space(out, size)
    with atomic_dir(out) as folder:
        src.write_side_files(folder / "hf")
        (folder / ARCHITECTURE).write_text(json.dumps(arch.to_dict(), indent=2), encoding="utf-8")
        with BackgroundSums() as sums:
            chunks = [_chunk(unit, src, arch, target, sums) for unit in units(arch)]
            write_model(folder / "dist", chunks, arch, target)
            facts["parameters_sha256"] = sums.result().hexdigest()
        write_done(folder, json.dumps(facts, indent=2))
    return report(facts["parameters_sha256"], up_to_date=False)


def _chunk(unit: Unit, src: Source, arch: Architecture, dtype: torch.dtype, sums: BackgroundSums) -> ChunkToWrite:
    shape = unit.rule.shape(arch)

    def make() -> Tensor:
        parts = [src.read(name) for name in unit.hf_shapes(arch)]
        tensor = unit.rule.merge([part.to(dtype) for part in parts], arch).contiguous()
        _check_finite(unit.name, tensor, src.where)
        sums.add(unit, tensor, arch)
        return tensor

    return ChunkToWrite(unit.key, shape, unit.at, unit.axes(arch), make)


def _check_finite(name: str, tensor: Tensor, where: str) -> None:
    low, high = tensor.aminmax()  # NaN and infinities reach the extremes: one pass, no temporary
    if not (low.isfinite() and high.isfinite()):
        raise UserError(
            f"{where}: {name} has values that are not finite in {dtype_name(tensor.dtype)}; "
            "the file is damaged, or the dtype too narrow (float16): copy it again or choose another dtype"
        )


def _check_tied(src: Source, ignored: tuple[str, ...]) -> None:
    if LM_HEAD in ignored and not torch.equal(src.read(LM_HEAD), src.read(EMBEDDING)):
        raise UserError(
            f"{src.where}: config.json ties the embeddings, but {LM_HEAD} differs from {EMBEDDING}; "
            "set tie_word_embeddings to false if the model was trained untied"
        )


def _existing_import(out: Path) -> dict[str, Any] | None:
    """The facts of the import at `out`, None when there is nothing; UserError when something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    facts = read_done(out) if is_done(out) else {}
    if facts.get("kind") != "import":
        raise UserError(f"{out} exists and is not an imported checkpoint; choose another folder or delete it first")
    return facts


def _check_space(out: Path, size: int) -> None:
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(
            f"{out} needs {size / _GB:.1f} GB, but only {free / _GB:.1f} GB are free; make room or choose another disk"
        )


# --------------------------------------------------------------------------------------------------------- export


def export_hf(
    checkpoint: Path | str, out: Path | str, *, dtype: str = "checkpoint", max_shard_gb: float = 5.0
) -> ExportReport:
    """Write the model of `checkpoint` (imported or trained, any layout) as Hugging Face folder `out`.

    `dtype` is `float32`, `bfloat16`, `float16` or `checkpoint` (as stored there). Weight files hold at most
    `max_shard_gb` (10^9 bytes) each. Vocabulary padding and a tied output layer are not written. Running again does
    nothing. Raises UserError when `checkpoint` is unfinished, incomplete or damaged, or `out` holds something else.
    """
    started = time.monotonic()
    out = Path(out)
    if max_shard_gb <= 0:
        raise UserError(f"max_shard_gb is {max_shard_gb}; it must be above 0")
    model = CheckpointModel(checkpoint)
    arch = model.architecture
    target = model.dtype if dtype == "checkpoint" else dtype_named(dtype)
    shapes = hf_shapes(arch)
    size = sum(torch.Size(shape).numel() for shape in shapes.values()) * target.itemsize
    config = _export_config(model, dtype_name(target))
    facts: dict[str, Any] = {
        "parameters_sha256": model.done.get("parameters_sha256"),
        "step": model.done.get("step"),
        "dtype": dtype_name(target),
        "max_shard_gb": max_shard_gb,
    }

    def report(files: list[str], up_to_date: bool) -> ExportReport:
        return ExportReport(
            folder=out,
            dtype=facts["dtype"],
            tensors=len(shapes),
            bytes=size,
            files=tuple(files),
            tokenizer=(out / "tokenizer_config.json").is_file(),
            seconds=time.monotonic() - started,
            up_to_date=up_to_date,
        )

    found = _existing_export(out)
    if found is not None and facts["parameters_sha256"] and found == facts and has_weight_files(out):
        return report(sorted(path.name for path in out.glob("*.safetensors")), up_to_date=True)
    _check_space(out, size)
    with atomic_dir(out) as folder:
        if (model.checkpoint / "hf").is_dir():
            copy_side_files(model.checkpoint / "hf", folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        tensors = ((name, tensor.to(target)) for name, tensor in model.hf_tensors())
        files = write_safetensors(folder, shapes, tensors, target, int(max_shard_gb * _GB))
        (folder / EXPORT_FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return report(files, up_to_date=False)


def _existing_export(out: Path) -> dict[str, Any] | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        facts = json.loads((out / EXPORT_FACTS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(
            f"{out} exists and was not written by an export (no readable {EXPORT_FACTS}); "
            "choose another folder or delete it first"
        ) from None
    return facts


def _export_config(model: CheckpointModel, dtype: str) -> dict[str, Any]:
    """The source's own config.json with the dtype brought up to date, or one made from the architecture."""
    path = model.checkpoint / "hf" / "config.json"
    if not path.is_file():
        return model.architecture.to_hf(dtype)
    config = json.loads(path.read_text(encoding="utf-8"))
    if Architecture.from_hf(config, str(path)) != model.architecture:
        raise UserError(f"{path} describes another model than architecture.json next to it; choose another checkpoint")
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype
    return config
