"""Readers of expert code: documents in an order that depends on nothing but the source."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.errors import UserError

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".gz": "json", ".arrow": "arrow"}


@dataclass(frozen=True)
class Document:
    """One source file or row. `code`: bytes of a file, or text. `licenses`: lower case, empty when unknown."""

    name: str
    code: bytes | str
    prompt: str = ""
    licenses: tuple[str, ...] = ()


def _path_key(relative: str) -> bytes:
    return hashlib.sha256(relative.encode("utf-8", "surrogatepass")).digest()


def _read_files(root: Path, paths: list[Path]) -> Iterator[Document]:
    """Documents in the order of a hash of their relative path, so that the first n are a fair sample."""
    named = [(path.relative_to(root).as_posix(), path) for path in paths]
    for name, path in sorted(named, key=lambda item: _path_key(item[0])):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; fix its permissions or leave it out of corpus.files"
            ) from error
        yield Document(name, content)


def _stdlib_paths(config: CorpusConfig) -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"} | (set() if config.include_tests else _TEST_FOLDERS)
    paths = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts) and p.is_file()]
    return root, paths


def _folder_paths(config: CorpusConfig) -> tuple[Path, list[Path]]:
    root = Path(config.path or "")
    if not root.is_dir():
        raise UserError(f"corpus.path = {root}; there is no such folder; give the folder with source files")
    found = {p for pattern in config.files or ("**/*.py",) for p in root.glob(pattern) if p.is_file()}
    return root, list(found)


def _dataset_files(config: CorpusConfig) -> list[str]:
    files = sorted(f for pattern in config.files for f in glob(str(Path(config.path or "") / pattern), recursive=True))
    if config.files and not files:
        raise UserError(f"corpus.files = {list(config.files)}; no file matches; check corpus.path and the globs")
    return files


def _open_dataset(config: CorpusConfig) -> Any:
    """The rows of a Hugging Face data set, from local files or a hub."""
    import datasets

    files = _dataset_files(config)
    # Its bars and its error lines would stand between ours: progress is told per document, errors are raised.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if not files:
            return datasets.load_dataset(config.path, config.name, split=config.split, streaming=config.streaming)
        builders = {_BUILDERS.get(Path(f).suffix) for f in files}
        builder = builders.pop()
        if builders or builder is None:
            raise UserError(
                f"corpus.files hold {sorted({Path(f).suffix for f in files})}; give one kind: parquet, jsonl or arrow"
            )
        return datasets.load_dataset(
            builder, data_files={config.split: files}, split=config.split, streaming=config.streaming
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # DatasetNotFoundError is an OSError, a bad split a ValueError, a failed build a RuntimeError.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load data set {config.path or list(config.files)} (split {config.split}): "
            f"{reason}; check the name, the split and the network"
        ) from error


def _licenses(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(str(v).lower() for v in values)


def _rows(config: CorpusConfig) -> Iterator[Document]:
    rows = _open_dataset(config)
    source = config.path or "files"
    wanted = [f for f in (config.text_field, config.prompt_field, config.license_field) if f]
    for number, row in enumerate(rows):
        missing = [f for f in wanted if f not in row]
        if missing:
            raise UserError(
                f"data set {source} has no column {missing[0]!r}; it has {', '.join(sorted(row))}; "
                "set corpus.text_field, prompt_field or license_field to one of them"
            )
        text = row[config.text_field]
        if not isinstance(text, str | bytes):
            raise UserError(
                f"column {config.text_field!r} of {source} holds {type(text).__name__} in row {number}; "
                "it must be text; set corpus.text_field to a text column"
            )
        prompt = row[config.prompt_field] or "" if config.prompt_field else ""
        licenses = _licenses(row[config.license_field]) if config.license_field else ()
        yield Document(f"{source}:{number}", text, prompt, licenses)


def read_corpus(config: CorpusConfig) -> Iterator[Document]:
    """Documents of the configured source, up to its limits.

    Raises UserError when the source is missing, unreadable, empty, or lacks a named column.
    """
    if config.kind == "datasets":
        documents = _rows(config)
    else:
        documents = _read_files(*(_stdlib_paths(config) if config.kind == "python_stdlib" else _folder_paths(config)))
    count = size = 0
    for document in documents:
        if (config.limit is not None and count >= config.limit) or (
            config.limit_bytes is not None and size >= config.limit_bytes
        ):
            return
        count += 1
        size += len(document.code)
        yield document
    if not count:
        raise UserError(
            f"corpus.kind = {config.kind}, path = {config.path}; it holds no documents; check path and files"
        )


def source_key(config: CorpusConfig) -> str:
    """SHA-256 of what tells one state of a local source from another: Python version, paths, sizes and times.

    A source on a hub is named by the settings alone. Cheap: no file is read.
    """
    paths: list[Path] = []
    if config.kind == "python_stdlib":
        paths = _stdlib_paths(config)[1]
    elif config.kind == "folder":
        paths = _folder_paths(config)[1]
    else:
        paths = [Path(f) for f in _dataset_files(config)]
    body = [sys.version if config.kind == "python_stdlib" else ""]
    body += [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sorted(paths)]
    return hashlib.sha256("\n".join(body).encode("utf-8", "surrogatepass")).hexdigest()
