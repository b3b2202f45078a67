"""Read and write Hugging Face model folders: safetensors, single or sharded, plus configuration and tokenizer."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ra3_megatron.checkpoint.hf_mapping import Shape
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of the dtypes weights are converted between."""

_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files next to the weights that a checkpoint carries along, so that it can be exported alone."""

_INDEX = "model.safetensors.index.json"
_LFS_MARK = b"version https://git-lfs"


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called `name`; UserError for anything that is no weight dtype."""
    if name not in DTYPES:
        raise UserError(f"dtype '{name}' is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` → `float32`."""
    return str(dtype).removeprefix("torch.")


class Source(Protocol):
    """Weights to import, with Hugging Face's tensor names whatever the file format."""

    where: str
    """Path shown in messages."""

    def architecture(self) -> Architecture:
        """Shape of the model."""

    def shapes(self) -> dict[str, Shape]:
        """Tensor name → shape, without reading the data."""

    def stored_dtype(self) -> torch.dtype:
        """The one dtype of all weights."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def fingerprint(self) -> str:
        """Hash that changes when the source's files change."""

    def write_side_files(self, folder: Path) -> None:
        """Put configuration and tokenizer into `folder`."""


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: Shape
    dtype: str


class HFFolder:
    """A Hugging Face folder with safetensors weights.

    All headers are read and checked at construction, so that a missing, truncated or foreign file is a UserError
    before anything is written.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.where = str(folder)
        self._architecture = Architecture.from_folder(self.folder)
        self._files = _weight_files(self.folder)
        self._entries: dict[str, _Entry] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files:
            for name, shape, dtype in _header(file):
                if name in self._entries:
                    raise UserError(
                        f"{self.where}: tensor {name} is in {self._entries[name].file.name} and in {file.name}; "
                        "delete the file that does not belong to the model"
                    )
                self._entries[name] = _Entry(file, shape, dtype)

    def architecture(self) -> Architecture:
        return self._architecture

    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def stored_dtype(self) -> torch.dtype:
        kinds = {entry.dtype for entry in self._entries.values()}
        unknown = kinds - set(_SAFETENSORS_DTYPES)
        if unknown:
            raise UserError(
                f"{self.where}: weights of dtype {', '.join(sorted(unknown))} cannot be imported; "
                "use the full-precision model (F32, BF16 or F16)"
            )
        if len(kinds) == 1:
            return _SAFETENSORS_DTYPES[kinds.pop()]
        return torch.float32  # the only one of the three that holds the other two exactly

    def read(self, name: str) -> Tensor:
        file = self._entries[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        sides = [self.folder / name for name in SIDE_FILES if (self.folder / name).is_file()]
        for path in [*self._files, *sides]:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def write_side_files(self, folder: Path) -> None:
        copy_side_files(self.folder, folder)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy configuration and tokenizer files from `source` to `folder` (made when missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is not a valid safetensors index; copy the model again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(names)} weight files named in {_INDEX} are missing "
                f"({', '.join(missing[:8])}); copy the model again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        raise UserError(
            f"{folder}: found {', '.join(loose[:8])} but neither model.safetensors nor {_INDEX}; "
            "copy the model again, with its index"
        )
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder}: the weights are pickles ({pickles[0]}), which can run code when loaded; convert them once with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise UserError(f"{folder}: no weights found; expected model.safetensors or {_INDEX}")


def has_weight_files(folder: Path) -> bool:
    """Whether every weight file that `folder` names is there."""
    try:
        return bool(_weight_files(folder))
    except UserError:
        return False


def _header(file: Path) -> Iterator[tuple[str, Shape, str]]:
    """Name, shape and dtype of each tensor of `file`; opening checks the header against the file's size."""
    try:
        with open(file, "rb") as f:
            if f.read(len(_LFS_MARK)) == _LFS_MARK:
                raise UserError(f"{file} is a Git LFS pointer, not the weights; run 'git lfs pull' in the model folder")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                piece = tensors.get_slice(name)
                yield name, tuple(piece.get_shape()), piece.get_dtype()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is corrupt or truncated ({error}; {file.stat().st_size} bytes); copy the model again"
        ) from None


# -------------------------------------------------------------------------------------------------------- writing


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split tensors (name → bytes), in order, into shards of at most `max_bytes`; a larger tensor gets its own."""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_safetensors(
    folder: Path, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, max_bytes: int
) -> list[str]:
    """Write `tensors` (in the order of `shapes`) as safetensors shards with an index; return the file names.

    At most one shard is held in memory. The files get the permissions of the folder's config.json.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_bytes)
    single = len(shards) == 1
    files = [
        "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    mode = (folder / "config.json").stat().st_mode
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for expected in names:
            name, tensor = next(stream)
            assert name == expected, (name, expected)
            assert tensor.dtype == dtype, (name, tensor.dtype)
            shard[name] = tensor.contiguous()
        save_file(shard, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, mode)  # safetensors makes it readable for its owner only
        del shard
    left = next(stream, None)  # also lets a generator say what it found at its end
    assert left is None, left
    if not single:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return files
