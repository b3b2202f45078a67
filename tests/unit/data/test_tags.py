"""Thoughts between tags, in text that is no Python."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ra3_megatron.config.data import CorpusConfig, DataConfig, FilterConfig, TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.latent import TagFormat, ThinkTokens, latent_format
from ra3_megatron.data.lines import plain_lines
from ra3_megatron.data.prepare import open_prepared, prepare
from ra3_megatron.data.store import TrajectoryStore
from ra3_megatron.data.tokenizers import HFTokenizer, Tokenizer
from ra3_megatron.data.trajectory import TrajectoryBuilder, keeps_program, splice

TEXT = '\n\nLeek soup (for four\n\n<b>cut</b> the leek\n  <think> is not at the line\'s start\n</think>\nboil """\n'


def test_plain_lines() -> None:
    """Blank lines belong to the line before, at the top to the first; nothing is lost."""
    lines = plain_lines(TEXT)
    assert "".join(TEXT[line.start : line.end] for line in lines) == TEXT
    assert [TEXT[line.start : line.end].strip().split()[0] for line in lines] == [
        "Leek", "<b>cut</b>", "<think>", "</think>", "boil"]  # fmt: skip
    assert plain_lines("\n \n") == []


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    """Thoughts at every line, among lines that look like tags, must leave no trace when they are taken out."""
    think = ThinkTokens(tokenizer, latent_format("tag"))
    expert = TrajectoryBuilder(tokenizer, think, tokenizer.start_id("auto")).build(TEXT)
    assert [d.line for d in expert.decisions] == [0, 1, 2, 3, 4]
    thoughts = {}
    for decision in expert.decisions:
        whole = think.format.render("a </think> b\n<think>", "    ")
        thoughts[decision.line] = tokenizer.encode(whole)
        token = tokenizer.encode(whole)[len(decision.forced)]
        assert tuple(tokenizer.encode(whole)[: len(decision.forced)]) == decision.forced
        assert token in think[decision.think_set].ids
    infused = splice(expert, thoughts)
    assert infused.num_lines == 5
    assert keeps_program(expert, infused, tokenizer, think.format)
    # The closing tag lost, its line end lost, or something else changed.
    whole = tokenizer.decode(tokenizer.encode("<think>a\n</think>\n") + expert.ids.tolist())
    assert think.format.same_meaning(TEXT, whole)
    assert not think.format.same_meaning(TEXT, whole.replace("</think>\n", "", 1))
    assert not think.format.same_meaning(TEXT, whole.replace("</think>\n", "</think>", 1))
    assert not think.format.same_meaning(TEXT, whole + "x\n")


def test_parts_of_a_thought(tokenizer: Tokenizer) -> None:
    """What is forced must spell the format's text, and no sampled token may spell the closing tag."""
    think = ThinkTokens(tokenizer, TagFormat())
    assert tokenizer.decode(think.tail_ids) == "</think>\n"
    assert tokenizer.decode(think.ending_ids) == "\n</think>\n"
    assert think.format.render("a\nb", "  ") == "<think>a b\n</think>\n"
    assert think.format.content("<think>a b\n\n</think>\n") == "a b"
    assert not think.format.token_fits(b"a\nb")
    closing = {tokenizer.token_bytes[i] for i in think.closing_ids.tolist()}
    assert b"\n" in closing
    assert all(c.endswith(b"\n") for c in closing)


def _respelled(bpe: Tokenizer, **changes: object) -> HFTokenizer:
    spec = json.loads(bpe._spec)  # type: ignore[attr-defined]
    for key, value in changes.items():
        spec[key] = value(spec[key])  # type: ignore[operator]
    return HFTokenizer(json.dumps(spec), {"eos_token": "<|endoftext|>"})


def test_tags_that_are_tokens(bpe: Tokenizer) -> None:
    """Tokenizers with a token for each tag (Qwen3): one token decides, and the closing one is not sampled."""
    added = [
        {"id": bpe.vocab_size + i, "content": c, "special": False, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, c in enumerate(("<think>", "</think>"))
    ]  # fmt: skip
    tokenizer = _respelled(bpe, added_tokens=lambda old: old + added)
    think = ThinkTokens(tokenizer, TagFormat())
    expert = TrajectoryBuilder(tokenizer, think, 0).build("one\n<two\n")
    assert [d.forced for d in expert.decisions] == [(), ()]
    assert think.opening_ids("") == (bpe.vocab_size,)
    assert bpe.vocab_size in think[expert.decisions[0].think_set].ids
    assert bpe.vocab_size + 1 in think.forbidden_ids
    assert think.tail_ids[0] == bpe.vocab_size + 1


def test_tokenizer_that_cannot_write_tags(bpe: Tokenizer) -> None:
    """A vocabulary without '<' would give thoughts without an opening."""

    def without(model: dict) -> dict:
        vocab = {p: i for p, i in model["vocab"].items() if "<" not in p or p == "<|endoftext|>"}
        return {**model, "vocab": vocab, "merges": [m for m in model["merges"] if "<" not in "".join(m)]}

    think = ThinkTokens(_respelled(bpe, model=without), TagFormat())
    with pytest.raises(UserError, match=r"'<think>'.*use a tokenizer"):
        think.opening_ids("")
    with pytest.raises(UserError, match="known formats: comment, tag"):
        latent_format("xml")


def test_preparation(tmp_path: Path, bpe: Tokenizer) -> None:
    """Python's rules must not be applied to other text, in part or silently."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"soup {i}\n# cut (the leek\n\n  boil\n")
    (folder / "x.txt").write_text("words\n<think>of someone else\n")
    config = DataConfig(
        CorpusConfig("folder", str(folder), ("**/*.txt",)),
        TokenizerConfig("train_bpe"),
        FilterConfig(syntax=False, min_tokens=1),
        comments="keep_as_action",
        validation_fraction=0.0,
        workers=1,
    )
    for wrong in (replace(config, comments="strip"), replace(config, filters=FilterConfig())):
        with pytest.raises(UserError, match=r"set data\.comments=keep_as_action"):
            prepare(wrong, bpe, 64, tmp_path / "out", latent="tag")
    made = prepare(config, bpe, 64, tmp_path / "out", latent="tag")
    assert made.report.dropped == {"thoughts": 1}
    assert (made.report.kept, made.report.decisions) == (6, 18)
    found = open_prepared(tmp_path / "out")
    assert found.think_tokens.format.name == "tag"
    assert found.fingerprint == made.fingerprint
    with pytest.raises(UserError, match="tag; comment is asked for"):
        TrajectoryStore(tmp_path / "out" / "train", ThinkTokens(found.tokenizer))
    assert prepare(replace(config, workers=2), bpe, 64, tmp_path / "out", latent="tag").reused
    assert not prepare(config, bpe, 64, tmp_path / "out").reused, "another format, another corpus"
