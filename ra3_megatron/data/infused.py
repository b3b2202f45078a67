"""Snippets with their thoughts as a dataset for people and other programs: parquet, as `datasets` reads it.

Training reads the ids from the trajectory stores; the texts here are decoded from them and never encoded again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Kind, Trajectory

ROWS_PER_FILE = 50_000
"""Rows after which a dataset goes on in the next file."""

SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "snippet": pa.int64(),
        "code": pa.string(),
        "expert": pa.string(),
        "thoughts": pa.list_(pa.struct({"line": pa.int32(), "text": pa.string(), "p_think": pa.float64()})),
        "decision_lines": pa.list_(pa.int32()),
        "p_think": pa.list_(pa.float64()),
        "line_log_probs": pa.list_(pa.float64()),
        "ids": pa.list_(pa.int32()),
        "provenance": pa.struct(
            {
                "run": pa.string(),
                "stage": pa.string(),
                "round": pa.int32(),
                "weights": pa.string(),
                "corpus": pa.string(),
            }
        ),
        "licenses": pa.list_(pa.string()),
    }
)
"""Columns of the dataset. `name` of the source document; `snippet` number in its part of the corpus; `code` the text
with thoughts, `expert` without (both with the prompt, without start token); `decision_lines` lines before which a
thought could stand, and `p_think` its probability there; `line_log_probs` nats per expert line, summed over its tokens,
NaN where they were not computed; `ids` what is trained on; `licenses` null where the corpus names none."""


@dataclass(frozen=True)
class InfusedSnippet:
    """One snippet with its thoughts."""

    snippet: int
    """Number in its part of the corpus."""
    trajectory: Trajectory = field(repr=False)
    """With thoughts."""
    p_think: np.ndarray = field(repr=False)
    """float64 [decisions]: probability of a thought; NaN where no rollout was kept."""
    line_log_probs: np.ndarray = field(repr=False)
    """float64 [lines]: log-likelihood of every expert line after its thought, nats; NaN where no rollout was kept."""


@dataclass(frozen=True)
class Provenance:
    """Where the thoughts of a dataset come from."""

    run: str
    """Name of the run folder."""
    stage: str
    """Name of the stage folder."""
    round: int
    """EM round, from 1."""
    weights: str
    """SHA-256 of the parameters that drew the thoughts."""
    corpus: str
    """Fingerprint of the corpus without thoughts."""


def infused_table(snippets: Sequence[InfusedSnippet], think_tokens: ThinkTokens, provenance: Provenance) -> pa.Table:
    """Rows of the dataset in the order of `snippets`; `licenses` is null until `with_licenses`."""
    rows = [{**_row(s, think_tokens), "provenance": vars(provenance), "licenses": None} for s in snippets]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(snippet: InfusedSnippet, think_tokens: ThinkTokens) -> dict:
    trajectory, tokenizer = snippet.trajectory, think_tokens.tokenizer
    p_think = {d.line: float(p) for d, p in zip(trajectory.decisions, snippet.p_think, strict=True)}
    expert = [trajectory.ids[s.start : s.end] for s in trajectory.segments if s.kind != Kind.THOUGHT]
    thoughts = [
        {"line": line, "text": think_tokens.format.content(tokenizer.decode(ids.tolist())), "p_think": p_think[line]}
        for line, ids in trajectory.thoughts().items()
    ]
    return {
        "name": _valid(trajectory.name),
        "snippet": snippet.snippet,
        "code": tokenizer.decode(trajectory.ids.tolist()),
        "expert": tokenizer.decode(np.concatenate(expert).tolist()),
        "thoughts": thoughts,
        "decision_lines": list(p_think),
        "p_think": list(p_think.values()),
        "line_log_probs": snippet.line_log_probs.tolist(),
        "ids": trajectory.ids.tolist(),
    }


def _valid(name: str) -> str:
    """File names may hold bytes that are no text; the dataset holds text."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def with_licenses(table: pa.Table, licenses: Sequence[Sequence[str]]) -> pa.Table:
    """The table with the licences of every row's document."""
    column = pa.array([list(found) for found in licenses], type=SCHEMA.field("licenses").type)
    return table.set_column(table.schema.get_field_index("licenses"), "licenses", column)


class DatasetWriter:
    """Writes `<part>-00000.parquet`, ... into a folder, `ROWS_PER_FILE` rows or a little more each."""

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        self._writer: pq.ParquetWriter | None = None
        self._files = self._rows = 0

    def append(self, table: pa.Table) -> None:
        """Add rows."""
        if self._writer is None:
            path = self._folder / f"{self._part}-{self._files:05d}.parquet"
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
            self._files += 1
        self._writer.write_table(table)
        self._rows += len(table)
        if self._rows >= ROWS_PER_FILE:
            self.close()

    def close(self) -> None:
        """Finish the file that is open."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._rows = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
