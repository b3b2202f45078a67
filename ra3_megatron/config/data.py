"""Settings of the corpus: where expert code comes from, what is dropped, how it is cut."""

from dataclasses import dataclass, field
from typing import Literal

from ra3_megatron.config.errors import UserError


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} = {value!r}; known values: {', '.join(allowed)}; set one of them")


def _at_least(name: str, value: float | None, minimum: float) -> None:
    if value is not None and value < minimum:
        raise UserError(f"{name} = {value}; it must be at least {minimum}; raise it")


@dataclass(frozen=True)
class CorpusConfig:
    """Where documents are read from."""

    kind: Literal["python_stdlib", "folder", "datasets"] = "python_stdlib"
    """`python_stdlib` (the running interpreter's library), `folder` (source files) or `datasets` (Hugging Face)."""
    path: str | None = None
    """`folder`: the folder. `datasets`: a hub name or a local folder; leave empty when `files` says it all."""
    files: tuple[str, ...] = ()
    """Globs. `folder`: which files under `path` (default `**/*.py`). `datasets`: local parquet, jsonl(.gz), arrow."""
    name: str | None = None
    """`datasets`: configuration (subset) name on the hub, for example a language."""
    split: str = "train"
    """`datasets`: split to read."""
    text_field: str = "content"
    """`datasets`: column that holds the source code."""
    prompt_field: str | None = None
    """`datasets`: column with the task text put before the code; it must be Python text (docstring, comments)."""
    license_field: str | None = None
    """`datasets`: column with the licence identifier, a string or a list of strings."""
    allowed_licenses: tuple[str, ...] = ()
    """Licences kept, lower-case identifiers; empty keeps all. Needs `license_field`."""
    streaming: bool = False
    """`datasets`: read row by row instead of downloading everything first."""
    include_tests: bool = False
    """`python_stdlib`: read the test suites too (they hold about twice as much code as the library)."""
    limit: int | None = None
    """Documents read at most; files come in the order of a hash of their path, so a limit is a fair sample."""
    limit_bytes: int | None = None
    """Bytes of source read at most, in the same order; about 3.5 bytes per token."""

    def __post_init__(self) -> None:
        _one_of("corpus.kind", self.kind, ("python_stdlib", "folder", "datasets"))
        _at_least("corpus.limit", self.limit, 1)
        _at_least("corpus.limit_bytes", self.limit_bytes, 1)
        if self.kind == "folder" and not self.path:
            raise UserError("corpus.kind = folder; corpus.path is empty; set it to the folder with source files")
        if self.kind == "datasets" and not (self.path or self.files):
            raise UserError(
                "corpus.kind = datasets; neither corpus.path nor corpus.files is set; give a hub name or local files"
            )
        if self.allowed_licenses and not self.license_field:
            raise UserError(
                "corpus.allowed_licenses is set; corpus.license_field is empty; name the column with the licence"
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns lines into ids."""

    kind: Literal["train_bpe", "hf", "sentencepiece"] = "hf"
    """`train_bpe` (byte-level BPE trained on the corpus), `hf` (Hugging Face) or `sentencepiece` (model file)."""
    path: str | None = None
    """`hf`: local folder or hub name, none = the base model's own. `sentencepiece`: the .model file."""
    vocab_size: int = 4096
    """`train_bpe`: number of entries, the end-of-text token included. Not used by the other kinds."""
    start_token: Literal["auto", "bos", "eos", "none"] = "auto"
    """Token before every piece: `bos`, `eos`, `none`, or `auto` (bos when there is one, else eos). With `none` the
    first line of a piece has no decision, since nothing precedes it."""

    def __post_init__(self) -> None:
        _one_of("tokenizer.kind", self.kind, ("train_bpe", "hf", "sentencepiece"))
        _one_of("tokenizer.start_token", self.start_token, ("auto", "bos", "eos", "none"))
        _at_least("tokenizer.vocab_size", self.vocab_size, 257)
        if self.kind == "sentencepiece" and not self.path:
            raise UserError("tokenizer.kind = sentencepiece; tokenizer.path is empty; set it to the .model file")


@dataclass(frozen=True)
class FilterConfig:
    """Which documents are dropped; every drop is counted by its reason."""

    syntax: bool = True
    """Drop documents that do not parse here. Off, they are still dropped if their lines cannot be found."""
    exact_duplicates: bool = True
    """Drop documents whose text was seen before."""
    near_duplicates: bool = False
    """Drop documents that resemble an earlier one (MinHash LSH over word 5-grams); 0.4 ms per kB of source."""
    near_duplicate_threshold: float = 0.8
    """Jaccard similarity from which two documents count as near duplicates."""
    min_tokens: int = 16
    """Drop documents with fewer tokens."""
    max_tokens: int | None = None
    """Drop documents with more tokens; None keeps all and leaves them to `long_snippets`."""

    def __post_init__(self) -> None:
        _at_least("filters.min_tokens", self.min_tokens, 0)
        _at_least("filters.max_tokens", self.max_tokens, max(1, self.min_tokens))
        if not 0 < self.near_duplicate_threshold <= 1:
            raise UserError(
                f"filters.near_duplicate_threshold = {self.near_duplicate_threshold}; it is a similarity; "
                "set a value above 0 and up to 1"
            )


@dataclass(frozen=True)
class DecontaminationConfig:
    """Removal of documents that share word n-grams with an evaluation set."""

    enabled: bool = True
    """Off keeps contaminated documents. On with no `benchmarks` checks nothing."""
    benchmarks: tuple[str, ...] = ()
    """Local files of tasks (.jsonl, .jsonl.gz, .json): HumanEval's and MBPP's formats and those of their plus sets."""
    ngram: int = 10
    """Words (identifiers and numbers, lower case) in a row that make a match. At least half of them must be words."""

    def __post_init__(self) -> None:
        _at_least("decontamination.ngram", self.ngram, 3)


@dataclass(frozen=True)
class DataConfig:
    """A corpus made ready for training: source, tokenizer, filters, cutting, validation part."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Where documents come from."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes ids."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What is dropped."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """What is dropped because an evaluation set holds it."""
    comments: Literal["strip", "keep_as_action"] = "strip"
    """Human comments: `strip` removes them, `keep_as_action` leaves them as lines of the expert."""
    long_snippets: Literal["error", "split", "drop"] = "split"
    """Documents above the sequence length: `error`, `split` at logical lines, or `drop`."""
    snippet_tokens: int | None = None
    """Most tokens of a snippet, at most train.seq_length, which it is when this is none. Thoughts need room: a snippet
    with its thoughts must fit into train.seq_length."""
    validation_fraction: float = 0.02
    """Part of the documents held out, chosen by a hash of the text, so that order and limits do not matter."""
    workers: int = 0
    """Processes for preparation; 0 means one per core, 1 stays in this process. Results do not depend on it."""

    def __post_init__(self) -> None:
        _one_of("data.comments", self.comments, ("strip", "keep_as_action"))
        _one_of("data.long_snippets", self.long_snippets, ("error", "split", "drop"))
        _at_least("data.workers", self.workers, 0)
        _at_least("data.snippet_tokens", self.snippet_tokens, 8)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction = {self.validation_fraction}; it is a fraction; set 0 up to below 1"
            )
