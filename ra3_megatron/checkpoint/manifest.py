"""What a finished checkpoint looks like on disk, and how to tell it from a damaged one; needs no ranks and no model.

    step_00000100/
        dist/               Megatron distributed checkpoint
        architecture.json   shape of the model
        hf/                 config.json, tokenizer, generation_config: the checkpoint can be exported alone
        state.json          TrainState
        manifest.json       size and SHA-256 of every file above
        DONE                written last: kind, step, hash of the parameters, hash of the manifest

While it is written the folder is called `step_00000100.partial`; it gets its name once DONE is inside.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import DONE, atomic_write_text, fsync_path

PARTIAL = ".partial"
"""Ending of a folder that is being written."""
DOOMED = ".deleted"
"""Ending of a folder that is being removed."""
MANIFEST = "manifest.json"
STATE = "state.json"
ARCHITECTURE = "architecture.json"

_NAME = re.compile(r"step_(\d{8,})")
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """What a file must look like to be the one that was written."""

    size: int
    """Bytes."""
    sha256: str
    """Digest of the content, 64 hexadecimal digits."""


def file_facts(path: Path) -> FileFacts:
    """Read `path` through; raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as f:
        while block := f.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return FileFacts(size, digest.hexdigest())


class DamagedCheckpoint(RuntimeError):
    """A folder that is not a complete checkpoint; the message names the file and the reason."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    folder: Path
    """Where it lies."""
    step: int
    """Optimizer step it was taken at."""
    parameters_sha256: str
    """Hash of the parameters, the same for every layout."""
    parameter_dtypes: tuple[str, ...]
    """Element types of the parameters, e.g. `("bfloat16",)`."""
    state: TrainState
    """Counters and positions."""
    files: Mapping[str, FileFacts]
    """Size and SHA-256 of every file, by its path below the folder."""
    verified: bool = False
    """Whether the content of every file was compared with its SHA-256."""

    @property
    def dist(self) -> Path:
        """Folder of the Megatron distributed checkpoint."""
        return self.folder / "dist"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files.values())


def step_folder(root: Path, step: int) -> Path:
    """`root/step_00000100` for step 100."""
    return root / f"step_{step:08d}"


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is called like a finished checkpoint, oldest first."""
    found = ((_NAME.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir()) if root.is_dir() else ()
    return sorted((int(m.group(1)), p) for m, p in found if m)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise DamagedCheckpoint(f"{path} holds {type(values).__name__}, expected an object")
    return values


def inspect(folder: Path) -> CheckpointInfo:
    """Read a checkpoint's records and compare every file's size; the contents are left to `content_problem`.

    Raises DamagedCheckpoint naming the file and the reason.
    """
    done = _read_json(folder / DONE)
    manifest = folder / MANIFEST
    entries = _read_json(manifest)
    found = hashlib.sha256(manifest.read_bytes()).hexdigest()
    if found != done.get("manifest_sha256"):
        raise DamagedCheckpoint(f"{manifest} has SHA-256 {found}, {DONE} says {done.get('manifest_sha256')}")
    try:
        files = {name: FileFacts(**facts) for name, facts in entries["files"].items()}
        facts = (int(done["step"]), str(done["parameters_sha256"]), tuple(done["parameter_dtypes"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder / DONE} or {manifest} lacks a field ({error})") from None
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} is missing ({error.strerror})") from None
        if size != expected.size:
            raise DamagedCheckpoint(f"{folder / name} has {size} bytes, {expected.size} were written")
    try:
        state = TrainState.from_json((folder / STATE).read_text(encoding="utf-8"), str(folder / STATE))
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{folder / STATE} cannot be read as a training state ({error})") from None
    return CheckpointInfo(folder, *facts, state, files)


def content_problem(info: CheckpointInfo, part: int = 0, parts: int = 1) -> str | None:
    """Read every `parts`-th file from number `part` on and compare its SHA-256; the first problem, or none."""
    for name in sorted(info.files)[part::parts]:
        path, expected = info.folder / name, info.files[name]
        try:
            found = file_facts(path)
        except OSError as error:
            return f"{path} cannot be read ({error})"
        if found != expected:
            return f"{path} has SHA-256 {found.sha256}, {expected.sha256} was written"
    return None


def finish_folder(
    partial: Path, final: Path, known: Mapping[str, FileFacts], facts: Mapping[str, Any]
) -> CheckpointInfo:
    """Write manifest and DONE into `partial` and give it its final name, replacing an older folder of that name.

    `known` are files whose content was checksummed as it was written; the others are read here.
    """
    files = dict(known)
    for path in _files(partial):
        name = path.relative_to(partial).as_posix()
        if name not in files:
            fsync_path(path)
            files[name] = file_facts(path)
    text = json.dumps({"files": {name: asdict(files[name]) for name in sorted(files)}}, indent=1)
    atomic_write_text(partial / MANIFEST, text)
    done = {**facts, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    atomic_write_text(partial / DONE, json.dumps(done, indent=1))
    inspect(partial)
    if final.exists():
        os.replace(final, _free_name(final))
    os.replace(partial, final)
    fsync_path(final.parent)
    return inspect(final)


def _free_name(final: Path) -> Path:
    number = 0
    while (name := final.with_name(f"{final.name}.{number}{DOOMED}")).exists():
        number += 1
    return name


def doom(folder: Path) -> Path:
    """Rename `folder` so that it no longer counts as a checkpoint; return the name it can be deleted under."""
    name = _free_name(folder)
    os.replace(folder, name)
    return name


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


def find_latest(root: Path, verify: bool = True) -> tuple[CheckpointInfo | None, list[str]]:
    """Newest complete checkpoint below `root`, and a message for every damaged one that was passed over.

    With `verify` the content of every file is compared too. For commands that run on one process; a training run asks
    `CheckpointStore.latest`, whose ranks share the reading.
    """
    messages = []
    for _, folder in reversed(step_folders(root)):
        try:
            info = inspect(folder)
        except DamagedCheckpoint as damage:
            messages.append(f"checkpoint {folder} is passed over: {damage}")
            continue
        problem = content_problem(info) if verify else None
        if problem is None:
            return info, messages
        messages.append(f"checkpoint {folder} is passed over: {problem}")
    return None, messages
