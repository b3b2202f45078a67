"""Tokenizers of every kind and a sample of real source files, made once."""

import ast
import io
import random
import sysconfig
import warnings
from pathlib import Path

import pytest

from ra3_megatron.data.lines import LineError, normalise
from ra3_megatron.data.tokenizers import SentencePieceTokenizer, Tokenizer, from_transformers, train_bpe
from tests.unit.smollm2 import MISSING, smollm2_path

SHARED = Path(__file__).parents[4] / "shared"


def _readable(path: Path) -> str | None:
    try:
        text = normalise(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (LineError, SyntaxError, ValueError):
        return None
    return text


@pytest.fixture(scope="session")
def stdlib_paths() -> list[Path]:
    """All Python files of the standard library, tests included, in a fixed mixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts)
    random.Random(0).shuffle(paths)
    return paths


@pytest.fixture(scope="session")
def stdlib_texts(stdlib_paths: list[Path]) -> list[str]:
    """Text of 60 parsable standard library files of at most 30 kB."""
    small = (p for p in stdlib_paths if p.stat().st_size < 30_000)
    found: list[str] = []
    for path in small:
        if (text := _readable(path)) and text.strip():
            found.append(text)
        if len(found) == 60:
            break
    return found


@pytest.fixture(scope="session")
def bpe(stdlib_texts: list[str]) -> Tokenizer:
    return train_bpe(stdlib_texts[:20], 1024)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(stdlib_texts: list[str]) -> Tokenizer:
    import sentencepiece

    model = io.BytesIO()
    rows = (row for text in stdlib_texts[:20] for row in text.split("\n") if row)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=rows,
        model_writer=model,
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    path = smollm2_path()
    if path is None:
        pytest.skip(MISSING)
    from transformers import AutoTokenizer

    return from_transformers(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


@pytest.fixture(scope="session", params=["bpe", "sentencepiece_tokenizer", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
