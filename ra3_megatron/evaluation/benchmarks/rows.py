"""Rows of task files: JSON lines (also gzipped), JSON, parquet, or a data set on the hub; and their fields, checked."""

import base64
import gzip
import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.benchmarks.plain import loads

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
"""Endings of files that can be read."""


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub."""

    name: str
    """Repository, such as `openai/openai_humaneval`."""
    subset: str | None = None
    """Configuration of the data set."""
    splits: tuple[str, ...] = ("test",)
    """Splits read, one after the other."""
    files: str | None = None
    """Glob of JSON lines inside the repository, for data sets whose own script is no longer run by `datasets`."""


@dataclass(frozen=True)
class Row:
    """One row and where it was."""

    values: dict[str, Any]
    """Fields by name."""
    place: str
    """File and line (or row), for messages."""

    def text(self, name: str, default: str | None = None) -> str:
        """A field that holds text; without a `default` it must be there and not empty."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or (default is None and not value.strip()):
            raise self._wrong(name, value, "text")
        return value

    def items(self, name: str, default: list | None = None) -> list:
        """A field that holds a list."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, list | tuple):
            raise self._wrong(name, value, "a list")
        return [*value]

    def texts(self, name: str) -> list[str]:
        """A field that holds a list of texts, at least one."""
        found = self.items(name)
        if not found or not all(isinstance(item, str) for item in found):
            raise self._wrong(name, found, "a list of texts, not empty")
        return found

    def number(self, name: str, default: float | None = None) -> float | None:
        """A field that holds a number; `default` where it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return value

    def json(self, name: str) -> Any:
        """A field that holds JSON as text (or, in some exports, plain data already)."""
        value = self.values.get(name)
        if not isinstance(value, str):
            if value is None:
                raise self._wrong(name, value, "JSON")
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise UserError(f"{self.place}: field {name} is not JSON ({error}); correct the row or remove it") from None

    def _wrong(self, name: str, value: Any, wanted: str) -> UserError:
        if value is None:
            found = "is missing" if name not in self.values else "is null"
            hint = f"; the row has {', '.join(sorted(self.values))}"
            return UserError(f"{self.place}: field {name} {found}, it must hold {wanted}{hint}")
        return UserError(f"{self.place}: field {name} holds {shown(value)}, it must hold {wanted}")

    def refuse(self, what: str) -> UserError:
        """An error about this row, to be raised."""
        return UserError(f"{self.place}: {what}; correct the row or remove it")


def shown(value: Any) -> str:
    """A value in at most some sixty characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_rows(paths: Sequence[Path]) -> tuple[list[Row], str]:
    """Rows of files, one after the other, and SHA-256 of their content. Raises UserError naming file and line."""
    rows: list[Row] = []
    digest = hashlib.sha256()
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is no task file; give one that ends in {', '.join(SUFFIXES)}")
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; give the path of a task file") from None
        if path.suffix == ".parquet":
            digest.update(raw)
            rows += _parquet(path, raw)
            continue
        try:
            content = gzip.decompress(raw) if path.suffix == ".gz" else raw
            text = content.decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); fetch it again") from None
        # Of what is inside: the same tasks packed anew are the same tasks.
        digest.update(content)
        rows += _json(path, text)
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))} holds no tasks; give a file with one JSON object per task")
    return rows, digest.hexdigest()


def _json(path: Path, text: str) -> Iterator[Row]:
    if path.name.removesuffix(".gz").endswith(".json") and text.lstrip()[:1] == "[":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); restore the file") from None
        numbered = [(f"{path}, entry {n}", value) for n, value in enumerate(values, start=1)]
    else:
        numbered = list(_lines(path, text))
    for place, value in numbered:
        if not isinstance(value, dict):
            raise UserError(f"{place} holds {shown(value)}, not an object; give one JSON object per task")
        yield Row(value, place)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines: a task's text may hold other line ends, such as U+2028, which JSON leaves as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except ValueError as error:
                raise UserError(f"{place} is not JSON ({error}); restore the file or remove the line") from None


def _parquet(path: Path, raw: bytes) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(raw))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); fetch it again") from None
    return [Row(values, f"{path}, row {n}") for n, values in enumerate(table.to_pylist(), start=1)]


def read_hub(hub: Hub) -> tuple[list[Row], str]:
    """Rows of a data set on the hub, or in the hub's cache. Raises UserError when it cannot be had."""
    import datasets

    datasets.disable_progress_bars()
    rows: list[Row] = []
    for split in hub.splits:
        try:
            if hub.files is not None:
                files = f"hf://datasets/{hub.name}/{hub.files}"
                found = datasets.load_dataset("json", data_files={split: files}, split=split)
            else:
                found = datasets.load_dataset(hub.name, hub.subset, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"data set {hub.name} ({split}) could not be had from the hub ({reason}); on a machine without network "
                "put its files into evaluation.data_dir (see docs/evaluation.md)"
            ) from error
        rows += [Row(dict(values), f"{hub.name} {split}, row {n}") for n, values in enumerate(found, start=1)]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.values, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return rows, digest.hexdigest()


def packed_json(row: Row, name: str) -> Any:
    """A field that holds JSON, or base64(zlib(pickle(JSON text))) as LiveCodeBench packs its private tests."""
    text = row.text(name)
    if text.lstrip()[:1] in "[{":
        return row.json(name)
    try:
        return json.loads(loads(zlib.decompress(base64.b64decode(text, validate=True))))
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{row.place}: field {name} is neither JSON nor base64 of a zlib-compressed pickle of JSON ({error}); "
            "fetch the file again"
        ) from None
