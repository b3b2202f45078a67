"""Removal of training documents that share n-grams of words with evaluation sets."""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.config.errors import UserError

_WORD = re.compile(r"\w+")
_TEXT_KEYS = ("prompt", "canonical_solution", "text", "code", "question_content", "solution")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def read_tasks(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a benchmark file (.jsonl, .jsonl.gz, .json). Raises UserError when it is missing or no such file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"decontamination.benchmarks: {path} does not exist; give the path of a benchmark file")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(r) for r in text.splitlines() if r]
    except (OSError, ValueError) as error:
        raise UserError(
            f"decontamination.benchmarks: {path} cannot be read ({error}); give .jsonl(.gz) or .json"
        ) from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"decontamination.benchmarks: {path} holds no tasks; give one JSON object per task")
    return rows


class NgramIndex:
    """Hashes of the word n-grams of evaluation tasks. Words are identifiers and numbers in lower case.

    N-grams in which fewer than half of the words have a letter are left out: rows of numbers are common in code.
    A task text shorter than n words is left out too. 64-bit hashes: a chance match per document is about 1 in 10^11.
    """

    def __init__(self, ngram: int, hashes: np.ndarray | None = None):
        self.ngram = ngram
        self.hashes = np.zeros(0, np.uint64) if hashes is None else hashes
        self._words: dict[str, int] = {}

    @classmethod
    def from_files(cls, paths: Iterable[Path | str], ngram: int) -> "NgramIndex":
        """Index of the task texts and reference solutions in benchmark files. Raises UserError for unknown formats."""
        index = cls(ngram)
        found = []
        for path in paths:
            texts = [row[k] for row in read_tasks(path) for k in _TEXT_KEYS if isinstance(row.get(k), str)]
            if not texts:
                raise UserError(
                    f"decontamination.benchmarks: {path} has none of the fields {', '.join(_TEXT_KEYS)}; "
                    "give a file in the format of HumanEval or MBPP"
                )
            found += [index._ngrams(text) for text in texts]
        index.hashes = np.unique(np.concatenate(found)) if found else index.hashes
        return index

    def _hash(self, word: str) -> int:
        value = self._words.get(word)
        if value is None:
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            # The lowest bit says whether the word has a letter or underscore.
            value = int.from_bytes(digest, "little") & ~1 | (not word.isdigit())
            self._words[word] = value
        return value

    def _ngrams(self, text: str) -> np.ndarray:
        words = _WORD.findall(text.lower())
        n = self.ngram
        if len(words) < n:
            return np.zeros(0, np.uint64)
        hashes = np.array([self._hash(w) for w in words], dtype=np.uint64)
        count = len(words) - n + 1
        rolled = np.zeros(count, np.uint64)
        letters = np.zeros(count, np.int64)
        for k in range(n):
            part = hashes[k : k + count]
            rolled = rolled * _MULTIPLIER + part
            letters += (part & np.uint64(1)).astype(np.int64)
        return rolled[2 * letters >= n]

    def __len__(self) -> int:
        return len(self.hashes)

    def contains_any(self, text: str) -> bool:
        """Whether `text` shares an n-gram with the tasks."""
        if not len(self.hashes):
            return False
        own = self._ngrams(text)
        positions = np.searchsorted(self.hashes, own)
        positions[positions == len(self.hashes)] = 0
        return bool((self.hashes[positions] == own).any())
