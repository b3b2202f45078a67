"""From a configured source to a corpus on disk: read, filter, tokenise, cut, split off validation, write.

The result depends on the source and the settings, never on the number of processes.
"""

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.config.data import DataConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_dir, atomic_write_text, is_done, write_done
from ra3_megatron.data.corpus import Document, read_corpus, source_key
from ra3_megatron.data.decontaminate import NgramIndex
from ra3_megatron.data.filters import REASONS, CorpusReport, DuplicateFilter, clean
from ra3_megatron.data.latent import ThinkTokens, latent_format
from ra3_megatron.data.licenses import LICENSES_FILE, license_line
from ra3_megatron.data.lines import PARSE_ERRORS, LineError, normalise, parse, strip_comments
from ra3_megatron.data.store import Columns, TrajectoryStore, TrajectoryWriter, to_columns
from ra3_megatron.data.tokenizers import Tokenizer, load_folder, load_tokenizer
from ra3_megatron.data.trajectory import RoundTripError, TrajectoryBuilder

_VERSION = 2
"""Raised when the same settings would give other ids, so that prepared corpora are made again."""
_CHUNK_BYTES = 256 * 1024
_CHUNK_DOCUMENTS = 64
_CHUNK_SECONDS = 900
_BPE_BYTES = 8 * 1024 * 1024
"""Source text that a BPE is trained on, at most; more changes the vocabulary little and costs 1.5 s per MB."""


@dataclass(frozen=True)
class PreparedCorpus:
    """A finished corpus. `fingerprint` names its content; `reused` tells that it was there already."""

    folder: Path
    tokenizer: Tokenizer
    think_tokens: ThinkTokens
    train: TrajectoryStore
    validation: TrajectoryStore
    report: CorpusReport
    fingerprint: str
    start_id: int | None
    reused: bool = False


@dataclass(frozen=True)
class _Result:
    """What a worker made of one document: a reason for dropping it, or its pieces."""

    name: str
    reason: str | None = None
    tokens: int = 0
    licenses: tuple[str, ...] = ()
    digest: bytes = b""
    signature: np.ndarray | None = None
    columns: Columns | None = None
    lost_lines: int = 0
    lost_pieces: int = 0


class _Worker:
    """Document → result; one per process."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, contamination: NgramIndex | None, limit: int, latent: str
    ):
        self.config, self.contamination, self.limit = config, contamination, limit
        self.tokenizer = tokenizer
        self.think_tokens = ThinkTokens(tokenizer, latent_format(latent))
        start_id = tokenizer.start_id(config.tokenizer.start_token)
        self.builder = TrajectoryBuilder(tokenizer, self.think_tokens, start_id)

    def chunk(self, documents: list[Document]) -> list[_Result]:
        """Results in the order of the documents."""
        return [self.document(d) for d in documents]

    def document(self, document: Document) -> _Result:
        """See the class."""
        cleaned = clean(document, self.config, self.contamination, self.think_tokens.format)
        name = document.name
        if isinstance(cleaned, str):
            return _Result(name, cleaned)
        try:
            lines = self.think_tokens.format.lines(cleaned.code)
            whole = self.builder.build(cleaned.code, cleaned.prompt, name, lines)
        except LineError:
            return _Result(name, "lines")
        except RoundTripError:
            return _Result(name, "round_trip")
        tokens, filters = len(whole.ids), self.config.filters
        if tokens < filters.min_tokens:
            return _Result(name, "too_short", tokens)
        if filters.max_tokens is not None and tokens > filters.max_tokens:
            return _Result(name, "too_long", tokens)
        if tokens > self.limit and self.config.long_snippets != "split":
            return _Result(name, "too_long", tokens)
        pieces, lost = self.builder.pieces(whole, cleaned.code, self.limit, lines)
        good = [p for p in pieces if len(pieces) == 1 or not cleaned.parses or self._parses(p.program(self.tokenizer))]
        if not good:
            return _Result(name, "unsplittable", tokens)
        columns = to_columns(good, self.think_tokens)
        bad = len(pieces) - len(good)
        return _Result(name, None, tokens, document.licenses, cleaned.digest, cleaned.signature, columns, lost, bad)

    @staticmethod
    def _parses(program: str) -> bool:
        try:
            parse(program)
        except PARSE_ERRORS:
            return False
        return True


_worker: _Worker | None = None


def _start_worker(*arguments: Any) -> None:
    """Initialise a spawned process; the arguments of `_Worker`."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore", SyntaxWarning)
    _worker = _Worker(*arguments)


def _work(documents: list[Document]) -> list[_Result]:
    assert _worker is not None
    return _worker.chunk(documents)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups of documents; their borders depend on the documents alone."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.code)
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _results(
    config: DataConfig, tokenizer: Tokenizer, contamination: NgramIndex | None, limit: int, latent: str
) -> Iterator[list[_Result]]:
    """Results of all chunks in the order of the corpus, with a bounded number under way."""
    workers = config.workers or len(os.sched_getaffinity(0))
    chunks = _chunks(read_corpus(config.corpus))
    if workers == 1:
        yield from map(_Worker(config, tokenizer, contamination, limit, latent).chunk, chunks)
        return
    arguments = (config, tokenizer, contamination, limit, latent)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, arguments) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result(timeout=_CHUNK_SECONDS)
            while waiting:
                yield waiting.popleft().result(timeout=_CHUNK_SECONDS)
        except BrokenProcessPool as error:
            raise UserError(
                "a data worker died (killed for memory, or a script without `if __name__ == '__main__':`); "
                "set data.workers = 1, or add that line to the script"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _goes_to_validation(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _write(
    config: DataConfig,
    results: Iterable[list[_Result]],
    think_tokens: ThinkTokens,
    folder: Path,
    limit: int,
    progress: Callable[[CorpusReport], None] | None,
) -> CorpusReport:
    """Drop duplicates, divide into train and validation, write both stores, and the licences where they are known."""
    report = CorpusReport()
    f = config.filters
    duplicates = DuplicateFilter(f.exact_duplicates, f.near_duplicates, f.near_duplicate_threshold)
    with ExitStack() as stack:
        train = stack.enter_context(TrajectoryWriter(folder / "train", think_tokens))
        validation = stack.enter_context(TrajectoryWriter(folder / "validation", think_tokens))
        licenses = None
        if config.corpus.license_field:
            licenses = stack.enter_context((folder / LICENSES_FILE).open("w", encoding="utf-8"))
        for chunk in results:
            for result in chunk:
                report.read += 1
                reason = result.reason or duplicates.check(result.digest, result.signature)
                if reason == "too_long" and config.long_snippets == "error" and result.tokens > limit:
                    raise UserError(
                        f"{result.name} has {result.tokens} tokens; a sequence holds {limit}; "
                        "set data.long_snippets to split or drop, or raise the sequence length"
                    )
                if reason is not None:
                    report.dropped[reason] += 1
                    continue
                assert result.columns is not None
                if licenses is not None:
                    licenses.write(license_line(result.name, result.licenses))
                held_out = _goes_to_validation(result.digest, config.validation_fraction)
                (validation if held_out else train).append_columns(result.columns)
                report.kept += 1
                report.validation_documents += held_out
                report.pieces += result.columns.count
                report.lines += len(result.columns.arrays["cuts"])
                report.tokens += len(result.columns.arrays["ids"])
                report.decisions += len(result.columns.arrays["decision_line"])
                report.lost_lines += result.lost_lines
                report.lost_pieces += result.lost_pieces
            if progress is not None:
                progress(report)
    if not report.kept or not train.count:
        reasons = ", ".join(f"{report.dropped[r]} {REASONS[r]}" for r in REASONS if report.dropped[r])
        raise UserError(
            f"no training document is left of {report.read} read ({reasons or 'all went to validation'}); "
            "loosen data.filters, or check the corpus and the tokenizer"
        )
    return report


def corpus_key(config: DataConfig, tokenizer: Tokenizer, seq_length: int, latent: str = "comment") -> str:
    """SHA-256 that names settings, source (paths, sizes, times), benchmarks, tokenizer and format of thoughts: equal
    key, equal corpus."""
    settings = asdict(replace(config, workers=1))
    benchmarks = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in config.decontamination.benchmarks]
    body = [_VERSION, settings, source_key(config.corpus), benchmarks, tokenizer.fingerprint, seq_length, latent]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, tokenizer: Tokenizer, start_id: int | None, latent: str, reused: bool) -> PreparedCorpus:
    think_tokens = ThinkTokens(tokenizer, latent_format(latent))
    train = TrajectoryStore(folder / "train", think_tokens)
    validation = TrajectoryStore(folder / "validation", think_tokens)
    report = CorpusReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    fingerprint = hashlib.sha256((train.fingerprint + validation.fingerprint).encode()).hexdigest()
    return PreparedCorpus(folder, tokenizer, think_tokens, train, validation, report, fingerprint, start_id, reused)


def open_prepared(folder: Path | str) -> PreparedCorpus:
    """Open a finished corpus as it is, without looking at its source. Raises UserError when there is none."""
    folder = Path(folder)
    if not is_done(folder):
        raise UserError(f"no prepared corpus at {folder} (no DONE); run the preparation stage first")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = load_folder(folder / "tokenizer")
    start_id = tokenizer.start_id(manifest["config"]["tokenizer"]["start_token"])
    return _open(folder, tokenizer, start_id, manifest["latent"], reused=True)


def _check_format(config: DataConfig, latent: str) -> None:
    """Raise UserError for settings that mean something for Python only."""
    if latent_format(latent).python:
        return
    if config.comments == "strip" or config.filters.syntax:
        raise UserError(
            f"latent.format is {latent}, data.comments is {config.comments} and data.filters.syntax is "
            f"{str(config.filters.syntax).lower()}; comments and syntax errors are found in Python only; set "
            "data.comments=keep_as_action and data.filters.syntax=false, or latent.format=comment for Python"
        )


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    out_dir: Path | str,
    progress: Callable[[CorpusReport], None] | None = None,
    latent: str = "comment",
) -> PreparedCorpus:
    """Make (or find again) the corpus for sequences of `seq_length` tokens in `out_dir`.

    A finished corpus with the same key is opened as it is; any other content of `out_dir` is replaced. `progress` is
    called with the running counts; `latent` is `latent.format`. Raises UserError for settings that do not fit it, for
    a source that is missing, unreadable, empty or all filtered out, and for documents that are too long when
    `long_snippets` is `error`.
    """
    out_dir = Path(out_dir)
    _check_format(config, latent)
    start_id = tokenizer.start_id(config.tokenizer.start_token)
    limit = seq_length - (tokenizer.eos_id is not None)
    contamination = None
    if config.decontamination.enabled and config.decontamination.benchmarks:
        contamination = NgramIndex.from_files(config.decontamination.benchmarks, config.decontamination.ngram)
    key = corpus_key(config, tokenizer, seq_length, latent)
    if is_done(out_dir) and json.loads((out_dir / "manifest.json").read_text(encoding="utf-8"))["key"] == key:
        return _open(out_dir, tokenizer, start_id, latent, reused=True)
    with atomic_dir(out_dir) as folder:
        results = _results(config, tokenizer, contamination, limit, latent)
        think_tokens = ThinkTokens(tokenizer, latent_format(latent))
        report = _write(config, results, think_tokens, folder, limit, progress)
        tokenizer.save(folder / "tokenizer")
        atomic_write_text(folder / "report.json", json.dumps(report.to_json(), indent=1))
        manifest = {
            "key": key,
            "seq_length": seq_length,
            "latent": latent,
            "tokenizer": tokenizer.fingerprint,
            "config": asdict(config),
        }
        atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
        write_done(folder)
    return _open(out_dir, tokenizer, start_id, latent, reused=False)


def _training_texts(config: DataConfig) -> Iterator[str]:
    """Text a BPE is trained on: the first documents of the corpus, with the comments it will see."""
    size = 0
    for document in read_corpus(config.corpus):
        try:
            text = normalise(document.code)
            text = strip_comments(text) if config.comments == "strip" else text
        except LineError:
            continue
        yield text
        size += len(text)
        if size >= _BPE_BYTES:
            return


def prepare_tokenizer(config: DataConfig, folder: Path | str) -> Tokenizer:
    """The configured tokenizer, saved in `folder`; `train_bpe` trains once and finds its result there again."""
    folder = Path(folder)
    key_file = folder / "trained_on.json"
    body = [_VERSION, asdict(config.corpus), config.comments, config.tokenizer.vocab_size, source_key(config.corpus)]
    key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    if config.tokenizer.kind != "train_bpe":
        tokenizer = load_tokenizer(config.tokenizer)
        tokenizer.save(folder)
        return tokenizer
    if key_file.is_file() and json.loads(key_file.read_text(encoding="utf-8"))["key"] == key:
        return load_folder(folder)
    tokenizer = load_tokenizer(config.tokenizer, _training_texts(config))
    tokenizer.save(folder)
    atomic_write_text(key_file, json.dumps({"key": key}))
    return tokenizer
