"""A corpus with thoughts: shards joined into trajectory stores and a dataset, opened like the corpus they come from."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ra3_megatron.config.files import atomic_dir, atomic_write_text, write_done
from ra3_megatron.data.infused import DatasetWriter, with_licenses
from ra3_megatron.data.licenses import LICENSES_FILE, LicenseReader
from ra3_megatron.data.prepare import PreparedCorpus, open_prepared
from ra3_megatron.data.shards import PARTS, Shard, ShardFolder
from ra3_megatron.data.store import TrajectoryWriter

CORPUS, DATASET, SHARDS = "corpus", "dataset", "shards"
"""Folders in a stage's `data`."""


def join_shards(
    shards: Sequence[Shard], made: ShardFolder, source: PreparedCorpus, data: Path
) -> dict[str, dict[str, float]]:
    """Join finished shards into `data/corpus` and `data/dataset`; returns the sums of their counts by part.

    Snippets stand in the order of the source. `source`: the corpus without thoughts. Doing it again gives the same
    files. Raises UserError for a shard that is missing or damaged.
    """
    for leftover in [*data.glob(".*.tmp"), *data.glob(".*.old")]:
        shutil.rmtree(leftover)
    counts: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    with ExitStack() as stack:
        folder = stack.enter_context(atomic_dir(data / CORPUS))
        dataset = stack.enter_context(atomic_dir(data / DATASET))
        stores = {p: stack.enter_context(TrajectoryWriter(folder / p, source.think_tokens)) for p in PARTS}
        tables = {p: stack.enter_context(DatasetWriter(dataset, p)) for p in PARTS}
        licenses = {p: LicenseReader(source.folder) for p in PARTS}
        tokens = 0
        for shard in shards:
            content, known = made.read(shard), licenses[shard.part]
            assert stores[shard.part].count == shard.start, "shards in order"
            stores[shard.part].append_columns(content.columns)
            table = content.table
            if known.known:
                # By the names in the store: the dataset's are made valid text.
                part = getattr(source, shard.part)
                names = [part[i].name for i in range(shard.start, shard.end)]
                table = with_licenses(table, [known.of(name) for name in names])
            tables[shard.part].append(table)
            counts[shard.part].update(content.counts)
            tokens += len(content.columns.arrays["ids"])
        _finish_corpus(folder, source, made.key, tokens)
    return {part: dict(counts[part]) for part in PARTS if counts[part]}


def _finish_corpus(folder: Path, source: PreparedCorpus, key: str, tokens: int) -> None:
    """What makes a folder with two stores a prepared corpus; the stores are closed before DONE is looked at."""
    source.tokenizer.save(folder / "tokenizer")
    report = replace(source.report, tokens=tokens)
    atomic_write_text(folder / "report.json", json.dumps(report.to_json(), indent=1))
    manifest: dict[str, Any] = json.loads((source.folder / "manifest.json").read_text(encoding="utf-8"))
    own = hashlib.sha256(f"{manifest['key']} {key}".encode()).hexdigest()
    atomic_write_text(folder / "manifest.json", json.dumps({**manifest, "key": own, "shards": key}, indent=1))
    if (source.folder / LICENSES_FILE).is_file():
        atomic_write_text(folder / LICENSES_FILE, (source.folder / LICENSES_FILE).read_text(encoding="utf-8"))
    write_done(folder)


def open_joined(data: Path) -> PreparedCorpus:
    """The corpus with thoughts that `join_shards` left in `data`. Raises UserError when there is none."""
    return open_prepared(data / CORPUS)
