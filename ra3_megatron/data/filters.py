"""What is dropped from a corpus, and why: every document ends as kept or under one reason."""

import hashlib
import re
from collections import Counter
from dataclasses import asdict, dataclass, field

import numpy as np

from ra3_megatron.config.data import DataConfig
from ra3_megatron.data.corpus import Document
from ra3_megatron.data.decontaminate import NgramIndex
from ra3_megatron.data.latent import CommentFormat, LatentFormat
from ra3_megatron.data.lines import PARSE_ERRORS, LineError, normalise, parse, same_tree, strip_comments

PERMUTATIONS = 128
_SHINGLE = 5
_SCHEME = "affine32"
_WORD = re.compile(r"\w+")

REASONS = {
    "license": "licence not allowed",
    "undecodable": "bytes that are no text in the declared encoding",
    "syntax": "does not parse with this Python version",
    "thoughts": "has lines that begin like a thought",
    "lines": "logical lines cannot be found",
    "comments": "removing comments would change the program",
    "empty": "nothing is left",
    "contaminated": "shares an n-gram with an evaluation set",
    "exact_duplicate": "same text as an earlier document",
    "near_duplicate": "resembles an earlier document",
    "too_short": "fewer than filters.min_tokens tokens",
    "too_long": "more than filters.max_tokens tokens, or than the sequence length with long_snippets: drop",
    "round_trip": "the tokenizer does not give the text back",
    "unsplittable": "no piece of it fits the sequence length",
}
"""Reasons for dropping a document, in words."""


@dataclass
class CorpusReport:
    """Counts of one preparation; `to_json` is what is written."""

    read: int = 0
    """Documents read."""
    kept: int = 0
    """Documents kept."""
    dropped: Counter = field(default_factory=Counter)
    """Documents dropped, by reason."""
    pieces: int = 0
    """Trajectories made of the documents kept."""
    lines: int = 0
    """Action lines in them."""
    tokens: int = 0
    """Tokens in them, start tokens included."""
    decisions: int = 0
    """Decision points in them."""
    lost_lines: int = 0
    """Lines of kept documents that fit in no piece."""
    lost_pieces: int = 0
    """Pieces that were no program even with their surroundings."""
    validation_documents: int = 0
    """Kept documents that went to the validation part."""

    def to_json(self) -> dict:
        """Plain data; reasons come with their meaning."""
        data = asdict(self)
        data["dropped"] = {r: {"count": self.dropped[r], "meaning": REASONS[r]} for r in REASONS if self.dropped[r]}
        return data

    @classmethod
    def from_json(cls, data: dict) -> "CorpusReport":
        """Inverse of `to_json`."""
        dropped = Counter({reason: entry["count"] for reason, entry in data["dropped"].items()})
        return cls(**{**data, "dropped": dropped})


@dataclass(frozen=True)
class CleanDocument:
    """A document that passed the filters that look at one document alone.

    `code` the text to train on; `parses` whether prompt and code are a program; `digest` SHA-256 of
    the normalised original; `signature` MinHash values uint64 `[PERMUTATIONS]` or None.
    """

    name: str
    code: str
    prompt: str
    parses: bool
    digest: bytes
    signature: np.ndarray | None


def signature(text: str) -> np.ndarray:
    """MinHash of the word 5-grams of `text`, uint64 `[PERMUTATIONS]`."""
    from datasketch import MinHash

    words = _WORD.findall(text)
    shingles = {" ".join(words[i : i + _SHINGLE]).encode() for i in range(max(1, len(words) - _SHINGLE + 1))}
    sketch = MinHash(num_perm=PERMUTATIONS, seed=1, scheme=_SCHEME)
    sketch.update_batch(sorted(shingles))
    return sketch.hashvalues


def clean(
    document: Document, config: DataConfig, contamination: NgramIndex | None, latent: LatentFormat | None = None
) -> CleanDocument | str:
    """The document ready for tokenising, or the reason (a key of REASONS) why it is dropped.

    `latent`, by default comments, says whether it is Python and how thoughts will be written.
    """
    latent = latent or CommentFormat()
    allowed = config.corpus.allowed_licenses
    if allowed and not (document.licenses and set(document.licenses) <= {a.lower() for a in allowed}):
        return "license"
    try:
        text = normalise(document.code)
        prompt = normalise(document.prompt) if document.prompt else ""
    except LineError:
        return "undecodable"
    if latent.mistakable(prompt + text):
        return "thoughts"
    tree = None
    try:
        tree = parse(prompt + text) if latent.python else None
    except PARSE_ERRORS:
        if config.filters.syntax:
            return "syntax"
    if contamination is not None and contamination.contains_any(prompt + text):
        return "contaminated"
    code = text
    if config.comments == "strip":
        try:
            code = strip_comments(text)
        except LineError:
            return "lines"
        if tree is not None and not _parses_to(tree, prompt + code):
            return "comments"
    if not code.strip():
        return "empty"
    digest = hashlib.sha256((prompt + "\0" + text).encode("utf-8", "surrogatepass")).digest()
    sketch = signature(code) if config.filters.near_duplicates else None
    return CleanDocument(document.name, code, prompt, tree is not None, digest, sketch)


def _parses_to(tree: object, text: str) -> bool:
    try:
        return same_tree(tree, parse(text))  # type: ignore[arg-type]
    except PARSE_ERRORS:
        return False


class DuplicateFilter:
    """Keeps the first of equal or similar documents, in the order they are shown."""

    def __init__(self, exact: bool, near: bool, threshold: float):
        self._seen: set[bytes] | None = set() if exact else None
        self._index = None
        self._count = 0
        self._sketches: dict = {}
        if near:
            from datasketch import MinHashLSH

            self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._threshold = threshold

    def check(self, digest: bytes, sketch: np.ndarray | None) -> str | None:
        """None for a new document (which is remembered), else the reason."""
        if self._seen is not None:
            if digest in self._seen:
                return "exact_duplicate"
            self._seen.add(digest)
        if self._index is not None:
            from datasketch import MinHash

            own = MinHash(num_perm=PERMUTATIONS, seed=1, hashvalues=sketch, scheme=_SCHEME)
            # LSH gives candidates: the estimate decides, so that chance neighbours are kept.
            if any(own.jaccard(self._sketches[other]) >= self._threshold for other in self._index.query(own)):
                return "near_duplicate"
            self._index.insert(self._count, own)
            self._sketches[self._count] = own
            self._count += 1
        return None
