"""Odd code and odd thoughts: tabs, form feeds, other line ends, bytes that are no text, empty or endless thoughts.

What becomes of thoughts that break the program is in `tests/unit/rollout/test_generation.py` and `test_experience.py`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ra3_megatron.config.data import CorpusConfig, DataConfig, FilterConfig
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.prepare import prepare
from ra3_megatron.data.tokenizers import train_bpe
from ra3_megatron.data.trajectory import Kind, keeps_program
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.e2e import small
from tests.e2e.test_bad_input import check, use_model
from tests.unit.model.hf_pairs import ARCHITECTURES

WINDOW, ROOM, LATENT = 96, 512, 4

TABS = "class Walk:\n\tdef step(self, x):\n\t\tif x:\n\t\t\treturn [\n\tx,\n]\n\t\treturn '''\n# no comment\n'''\n"
ODD = {
    "tabs": TABS.encode(),
    "ends": b"def f(a):\r\n    b = a\r\n    return b\r\n\r\nx = f(1)\r\n",
    "feeds": b"import os\n\x0c\ndef g():\n\x0c    y = 1 + \\\n  2\n    return y\n\x0cz = g()\n",
    "latin": "name = 'Größe'\nother = name\n".encode("latin-1"),
    "long": ("first = 1\nrow = [" + ", ".join(map(str, range(100, 200))) + "]\nlast = 2\nmore = 3\n").encode(),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The odd files as a corpus, many rollouts of each, and the think tokens."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "code").mkdir()
    for name, content in ODD.items():
        (folder / "code" / f"{name}.py").write_bytes(content)
    texts = [content.decode("utf-8", errors="ignore") for content in ODD.values()]
    # A comment without content is a token of its own, and so is a hash with an indentation before it.
    tokenizer = train_bpe([*texts, "#\n" * 50, "\t\t# a\n    # b\n" * 20], 320)
    config = DataConfig(
        CorpusConfig("folder", str(folder / "code")),
        filters=FilterConfig(min_tokens=0),
        validation_fraction=0,
        workers=1,
    )
    corpus = prepare(config, tokenizer, WINDOW, folder / "corpus")
    shape = dataclasses.replace(ARCHITECTURES["qwen3"], num_layers=2, vocab_size=tokenizer.vocab_size)
    experts = list(corpus.train)
    with initialize() as parallel:
        seed_everything(0, parallel)
        chunks = build_model(shape, ModelConfig(init_std=0.2, vocab_multiple=8), parallel)
        with torch.no_grad():
            unwrap(chunks[0]).output_layer.weight[corpus.think_tokens.closing_ids] *= 3
        engine = MegatronEngine(chunks, shape, parallel, max_batch=32, max_tokens=ROOM)

        def often(number: int, member: int, size: tuple[int, int]) -> np.ndarray:
            uniforms = np.random.default_rng([number, member]).random(size)
            uniforms[:, 0] *= 0.01
            return uniforms

        found = rollout(engine, experts, 24, often, RolloutSettings(1.0, LATENT), corpus.think_tokens)
    return corpus, experts, found


def test_odd_sources_are_kept_as_they_are_or_counted(drawn):
    """A tab that became spaces, a carriage return that ended a comment early, a file that vanished without a word."""
    corpus, experts, _ = drawn
    assert corpus.report.read == len(ODD)
    assert dict(corpus.report.dropped) == {"undecodable": 1}
    assert corpus.report.lost_lines == 1, "the line that fits into no window"
    texts = {t.name.rpartition("/")[2].removesuffix(".py"): "" for t in experts}
    for t in experts:
        texts[t.name.rpartition("/")[2].removesuffix(".py")] += corpus.tokenizer.decode(t.ids)
    assert texts["tabs"] == TABS
    assert texts["ends"] == ODD["ends"].decode().replace("\r\n", "\n")
    assert texts["feeds"] == ODD["feeds"].decode()
    assert texts["long"] == "first = 1\nlast = 2\nmore = 3\n"


def test_thoughts_between_odd_lines_keep_the_program(drawn):
    """A comment inside brackets, a string or after a backslash; one whose indentation is another; code that changed."""
    corpus, experts, found = drawn
    latent = corpus.think_tokens.format
    thoughts = {t.name: 0 for t in experts}
    for one in found:
        expert = experts[one.number]
        assert keeps_program(expert, one.trajectory, corpus.tokenizer, latent), one.trajectory.program(corpus.tokenizer)
        code = one.trajectory.kinds() != Kind.THOUGHT
        np.testing.assert_array_equal(one.trajectory.ids[code], expert.ids)
        thoughts[expert.name] += int(one.thought.sum())
    assert min(thoughts.values()) > 4, thoughts


def test_thoughts_without_content_and_without_end(drawn):
    """An empty thought that took the next line for its content, and one that never ended."""
    corpus, _, found = drawn
    tokenizer, latent = corpus.tokenizer, corpus.think_tokens.format
    empty = truncated = 0
    for one in found:
        for line, ids in one.trajectory.thoughts().items():
            text = tokenizer.decode(ids)
            assert text.endswith("\n")
            assert text.strip().startswith("#")
            assert len(text.rstrip("\n").split("\n")) == 1, repr(text)
            empty += latent.content(text) == ""
            if line in one.truncated:
                truncated += 1
                # Forced beginnings and the end are no part of the limit.
                assert len(ids) >= LATENT + 1
    assert empty > 0
    assert truncated > 0


@pytest.mark.parametrize("arm", ["ra3", "self_comment"])
def test_tokenizer_without_a_hash_is_refused(arm, server, base, tmp_path):
    """Thoughts that nobody could write: found after the corpus was prepared, or never."""
    config = small.config(tmp_path, run={"arms": [arm]})
    model = use_model(tmp_path, config, base / "run" / "02-export" / "hf")
    path = model / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    bpe = spec["model"]
    bpe["merges"] = [m for m in bpe["merges"] if "#" not in "".join(m)]
    bpe["vocab"] = {piece: i for piece, i in bpe["vocab"].items() if "#" not in piece}
    path.write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (ended,) = server.cli(["midtrain", str(tmp_path / "config.yaml")])
    check(ended, ("latent.format", "comment", "'#'", "tokenizer"), Path(config["run"]["dir"]))
