"""Shards of a corpus in the making: each is written whole by one replica, and found again after a crash.

A shard is three files; the `.json`, written last, holds its counts and the checksums of the other two.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_bytes, atomic_write_text
from ra3_megatron.data.store import Columns

PARTS = ("train", "validation")
"""Parts of a corpus, in the order in which their shards are numbered."""

_SETS = "think_sets"


@dataclass(frozen=True)
class Shard:
    """Neighbouring snippets of one part."""

    number: int
    """From 0, over all parts."""
    part: str
    """One of `PARTS`."""
    start: int
    """First snippet."""
    end: int
    """Snippet after the last."""


def plan_shards(lengths: Mapping[str, np.ndarray], snippets: int) -> list[Shard]:
    """Cut every part into shards of about equal tokens and `snippets` snippets on average, or a little fewer.

    `lengths` tokens of every snippet by part. The plan depends on nothing else, the number of replicas least of all.
    """
    shards: list[Shard] = []
    for part in PARTS:
        tokens = np.cumsum(lengths[part], dtype=np.int64)
        if not len(tokens):
            continue
        count = -(-len(tokens) // snippets)
        cuts = np.searchsorted(tokens, tokens[-1] * np.arange(1, count, dtype=np.int64) // count, side="right")
        borders = np.unique(np.concatenate(([0], cuts, [len(tokens)]))).tolist()
        for start, end in pairwise(borders):
            shards.append(Shard(len(shards), part, start, end))
    return shards


@dataclass(frozen=True)
class ShardContent:
    """What a shard holds."""

    columns: Columns
    """Its trajectories, with thoughts."""
    table: pa.Table
    """Its rows of the dataset."""
    counts: dict[str, float]
    """What is to be summed over shards."""


class ShardFolder:
    """The shards of one job. `key` names what they are made from: shards of another key do not count."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"shard-{number:06d}.{kind}"

    def finished(self, shards: Sequence[Shard], alone: bool = True) -> list[int]:
        """Numbers of the shards that are on disk, whole and of this key; call it while nobody writes one of `shards`.

        Leftovers of killed writers are removed, and the `.json` of shards that do not count: all of them, or without
        `alone` those of `shards`, since other jobs may be at work on the rest.
        """
        found = [shard.number for shard in shards if self._facts(shard) is not None and self._whole(shard)]
        kept = {self._path(number, "json") for number in found}
        names = ["*"] if alone else [f"{shard.number:06d}" for shard in shards]
        for name in names:
            for path in [*self.folder.glob(f".shard-{name}.*.tmp"), *self.folder.glob(f"shard-{name}.json")]:
                if path not in kept:
                    path.unlink()
        return found

    def count(self) -> int:
        """Shards finished so far by whichever process; for the progress line."""
        return sum(1 for _ in self.folder.glob("shard-*.json"))

    def _facts(self, shard: Shard) -> dict[str, Any] | None:
        """The shard's `.json`, when there is one of this key and these snippets."""
        path = self._path(shard.number, "json")
        if not path.is_file():
            return None
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts if facts["key"] == self.key and facts["snippets"] == [shard.start, shard.end] else None

    def _whole(self, shard: Shard) -> bool:
        facts = self._facts(shard)
        assert facts is not None
        return all(
            (path := self._path(shard.number, kind)).is_file()
            and hashlib.sha256(path.read_bytes()).hexdigest() == facts[kind]
            for kind in ("npz", "parquet")
        )

    def write(self, shard: Shard, content: ShardContent) -> None:
        """Write the shard; a crash at any moment leaves it whole or absent."""
        buffer = io.BytesIO()
        sets = json.dumps([[remainder, list(rest)] for remainder, rest in content.columns.think_keys]).encode()
        arrays = {**content.columns.arrays, _SETS: np.frombuffer(sets, dtype=np.uint8)}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        rows = pa.BufferOutputStream()
        pq.write_table(content.table, rows, compression="zstd")
        files = {"npz": buffer.getvalue(), "parquet": rows.getvalue().to_pybytes()}
        for kind, raw in files.items():
            atomic_write_bytes(self._path(shard.number, kind), raw)
        facts = {
            "key": self.key,
            "snippets": [shard.start, shard.end],
            "counts": content.counts,
            **{kind: hashlib.sha256(raw).hexdigest() for kind, raw in files.items()},
        }
        atomic_write_text(self._path(shard.number, "json"), json.dumps(facts))

    def read(self, shard: Shard) -> ShardContent:
        """Read a finished shard. Raises UserError when it is missing or was changed since it was written."""
        facts = self._facts(shard)
        if facts is None or not self._whole(shard):
            raise UserError(
                f"shard {shard.number} of {self.folder} is missing or damaged; run the same command again, which makes "
                "it anew"
            )
        with np.load(self._path(shard.number, "npz")) as found:
            arrays = {name: found[name] for name in found.files}
        sets = json.loads(arrays.pop(_SETS).tobytes())
        columns = Columns(shard.end - shard.start, arrays, tuple((r, tuple(rest)) for r, rest in sets))
        return ShardContent(columns, pq.read_table(self._path(shard.number, "parquet")), facts["counts"])
