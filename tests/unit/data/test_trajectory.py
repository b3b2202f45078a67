"""Trajectories: text ↔ segments ↔ ids, decision points, splicing, pieces, storage."""

import ast
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.lines import logical_lines, strip_comments
from ra3_megatron.data.store import TrajectoryStore, write_store
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.data.trajectory import (
    Kind,
    Trajectory,
    TrajectoryBuilder,
    keeps_program,
    splice,
    split_trajectory,
)

relaxed = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
CODE = "def f(x):\n    if x:\n        return 1\n\n    return [\n        2,\n    ]\n"


def builder(tokenizer: Tokenizer) -> TrajectoryBuilder:
    return TrajectoryBuilder(tokenizer, ThinkTokens(tokenizer), tokenizer.start_id("auto"))


def line_text(trajectory: Trajectory, tokenizer: Tokenizer, line: int) -> str:
    segment = trajectory.segment(line)
    assert segment is not None
    return tokenizer.decode(trajectory.ids[segment.start : segment.end])


@cache
def brute_force(tokenizer: Tokenizer, forced: tuple[int, ...], indent: str) -> frozenset[int]:
    """Ids whose text continues `forced` to a comment that stays on its line."""
    start = tokenizer.decode_bytes(forced)
    found = set()
    for token in range(tokenizer.vocab_size):
        text = start + tokenizer.token_bytes[token]
        body = text.removeprefix(f"{indent}#".encode())
        if token in tokenizer.special_ids or body == text or b"\r" in text or b"\0" in text:
            continue
        if not body.partition(b"\n")[2].strip(b"\n"):
            found.add(token)
    return frozenset(found)


def check_decisions(trajectory: Trajectory, think: ThinkTokens, code: str) -> None:
    """Forced parts and think sets against their definition."""
    lines = logical_lines(code)
    starts = {s.line: s for s in trajectory.segments if s.kind == Kind.CODE}
    for decision in trajectory.decisions:
        segment, indent = starts[decision.line], lines[decision.line].indent
        opening = think.tokenizer.encode(indent + "#")
        ids = trajectory.ids[segment.start : segment.end].tolist()
        common = 0
        while opening[common] == ids[common]:
            common += 1
        assert decision.forced == tuple(opening[:common])
        assert decision.position == segment.start + common < segment.end
        think_set = think[decision.think_set]
        expected = brute_force(think.tokenizer, decision.forced, indent)
        if think_set.opener is not None:
            assert [think_set.opener, *think_set.completion] == opening[common:]
            expected |= {think_set.opener}
        assert set(think_set.ids.tolist()) == expected
        assert ids[common] not in expected
        assert opening[common] in expected


def test_decision_point_by_hand(smollm2: Tokenizer) -> None:
    """SmolLM2 puts the last space of an indentation into the next token: the forced part is three of four spaces."""
    think = ThinkTokens(smollm2)
    trajectory = TrajectoryBuilder(smollm2, think, None).build(CODE)
    by_line = {d.line: d for d in trajectory.decisions}
    assert 0 not in by_line, "nothing precedes the first token, so it cannot be decided"
    if_line = by_line[1]
    assert smollm2.decode(if_line.forced) == "   "
    assert smollm2.decode([int(trajectory.ids[if_line.position])]) == " if"
    found = {smollm2.decode([i]) for i in think[if_line.think_set].ids.tolist()}
    assert " #" in found
    assert all(text.startswith(" #") for text in found)
    check_decisions(trajectory, think, CODE)


def test_opening_that_needs_two_tokens() -> None:
    """A vocabulary that merges the indentation with a word (Qwen: tab + word) decides before the hash is there."""
    import json

    from ra3_megatron.data.tokenizers import HFTokenizer, train_bpe

    base = json.loads(train_bpe(["\treturn x\n" * 50], 300)._spec)
    base["pre_tokenizer"]["use_regex"] = False
    base["model"]["vocab"] = {k: v for k, v in base["model"]["vocab"].items() if len(k) == 1 or v == 0}
    size = len(base["model"]["vocab"])
    base["model"]["vocab"]["ĉr"] = size
    base["model"]["merges"] = [["ĉ", "r"]]
    tokenizer = HFTokenizer(json.dumps(base), {"eos_token": "<|endoftext|>"})
    code = "if x:\n\treturn\n"
    think = ThinkTokens(tokenizer)
    trajectory = TrajectoryBuilder(tokenizer, think, tokenizer.eos_id).build(code)
    decision = trajectory.decisions[1]
    tab, hash_id = tokenizer.encode("\t#")
    assert decision.forced == ()
    assert think[decision.think_set].ids.tolist() == [tab]
    assert think[decision.think_set].forced_after(tab) == (hash_id,)
    check_decisions(trajectory, think, code)


def test_human_comment_kept_as_action_has_no_decision(tokenizer: Tokenizer) -> None:
    """Every continuation of `#` is a comment: p_think would be 1 and log(1 - p_think) minus infinity."""
    code = "x = 1\n# why\ny = 2\n"
    trajectory = builder(tokenizer).build(code)
    assert [d.line for d in trajectory.decisions] == [0, 2]


@relaxed
@given(data=st.data())
def test_segments_ids_and_text_agree(data: st.DataObject, tokenizer: Tokenizer, stdlib_texts: list[str]) -> None:
    """Ids are the segments' own ids and decode to the very text; decisions meet their definition."""
    code = data.draw(st.sampled_from(stdlib_texts))
    if data.draw(st.booleans()):
        code = strip_comments(code)
    made = builder(tokenizer)
    trajectory = made.build(code)
    assert tokenizer.decode(trajectory.ids) == code
    lines = logical_lines(code)
    assert trajectory.num_lines == len(lines)
    own = [tokenizer.encode(code[line.start : line.end]) for line in lines]
    assert trajectory.ids.tolist() == [made.start_id, *(i for ids in own for i in ids)]
    assert [s.start for s in trajectory.segments[1:]] == [s.end for s in trajectory.segments[:-1]]
    assert trajectory.segments[-1].end == len(trajectory.ids) == len(trajectory.kinds())
    keep = sorted(data.draw(st.sets(st.sampled_from(range(len(trajectory.decisions))), max_size=8)))
    check_decisions(
        replace(trajectory, decisions=tuple(trajectory.decisions[i] for i in keep)), made.think_tokens, code
    )


@relaxed
@given(data=st.data())
def test_spliced_comments_keep_the_program(data: st.DataObject, tokenizer: Tokenizer, stdlib_texts: list[str]) -> None:
    """Thoughts at any set of decisions, of any printable text, in any piece of a file."""
    code = strip_comments(data.draw(st.sampled_from(stdlib_texts)))
    made = builder(tokenizer)
    whole = made.build(code)
    limit = data.draw(st.integers(64, 1024))
    pieces, lost = made.pieces(whole, code, limit)
    assert lost or "".join(tokenizer.decode(p.ids) for p in pieces) == code
    assert [p.ends_document for p in pieces].count(True) <= 1
    if not pieces:
        return
    piece = data.draw(st.sampled_from(pieces))
    assert len(piece.ids) <= limit
    ast.parse(piece.program(tokenizer))
    thoughts = {}
    for decision in piece.decisions:
        if data.draw(st.booleans()):
            text = line_text(piece, tokenizer, decision.line).lstrip("\n")
            indent = text[: len(text) - len(text.lstrip(" \t\f"))]
            thought = data.draw(st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=20))
            thoughts[decision.line] = tokenizer.encode(made.think_tokens.format.render(thought, indent))
    infused = splice(piece, thoughts)
    assert keeps_program(piece, infused, tokenizer, made.think_tokens.format)
    assert {k: v.tolist() for k, v in infused.thoughts().items()} == thoughts
    code_ids = infused.ids[infused.kinds() != Kind.THOUGHT]
    assert np.array_equal(code_ids, piece.ids)
    for decision in infused.decisions:
        chosen = int(infused.ids[decision.position])
        assert (chosen in made.think_tokens[decision.think_set].ids) == (decision.line in thoughts)
    again, _ = split_trajectory(infused, 10**6, made.start_id)
    assert np.array_equal(again[0][0].ids, infused.ids)
    assert again[0][0].decisions == infused.decisions


@pytest.mark.parametrize("thought", ["    # a\rx = 1\n", "    # a\n    y = 2\n", "    # no line end", "    z = 3\n"])
def test_thoughts_that_change_the_program_are_found(bpe: Tokenizer, thought: str) -> None:
    """A carriage return ends a line in Python: such a thought would run as code."""
    made = builder(bpe)
    trajectory = made.build(CODE)
    infused = splice(trajectory, {1: bpe.encode(thought)})
    assert not keeps_program(trajectory, infused, bpe, made.think_tokens.format)


def test_closing_and_forbidden_tokens(tokenizer: Tokenizer) -> None:
    """A token with text after its line end would put the next line's beginning into the thought."""
    think = ThinkTokens(tokenizer)
    closing = {tokenizer.token_bytes[i] for i in think.closing_ids.tolist()}
    forbidden = set(think.forbidden_ids.tolist())
    assert b"\n" in closing
    assert all(c.endswith(b"\n") and not c.rstrip(b"\n").count(b"\n") for c in closing)
    assert tokenizer.special_ids <= forbidden
    for token, content in enumerate(tokenizer.token_bytes):
        assert (token in forbidden) == (not content or b"\r" in content or b"\0" in content
                                        or bool(content.partition(b"\n")[2].strip(b"\n")))  # fmt: skip


def test_prompt_is_a_segment_without_decisions(bpe: Tokenizer) -> None:
    trajectory = builder(bpe).build("def g():\n    pass\n", prompt='"""Task."""\n')
    assert trajectory.segments[0].kind == Kind.PROMPT
    assert bpe.decode(trajectory.ids[: trajectory.segments[0].end]) == '"""Task."""\n'
    assert [d.line for d in trajectory.decisions] == [0, 1]
    pieces, lost = split_trajectory(trajectory, len(trajectory.ids) - 1, bpe.eos_id)
    assert lost == 0
    assert pieces[0][0].segments[0].end == trajectory.segments[0].end
    assert pieces[1][0].ids[0] == bpe.eos_id


def test_store_gives_trajectories_back(tmp_path: Path, bpe: Tokenizer, stdlib_texts: list[str]) -> None:
    """Think sets are numbered by first use on disk and must map to the reader's own numbers."""
    made = builder(bpe)
    made.think_tokens.decide("\t\t\t", "\t\t\tx", bpe.encode("\t\t\tx"))  # shifts the writer's numbering
    written = []
    for code in stdlib_texts[:8]:
        written += made.pieces(made.build(code, name="n/ä.py"), code, 256)[0]
    store = write_store(tmp_path / "s", written, made.think_tokens)
    reader = TrajectoryStore(tmp_path / "s", ThinkTokens(bpe))
    reader.verify()
    assert len(reader) == len(written)
    for one, two in zip(written, reader, strict=True):
        assert np.array_equal(one.ids, two.ids)
        assert np.array_equal(one.cuts, two.cuts)
        assert (one.segments, one.name, one.prefix, one.suffix) == (two.segments, two.name, two.prefix, two.suffix)
        assert (one.has_start, one.ends_document) == (two.has_start, two.ends_document)
        for a, b in zip(one.decisions, two.decisions, strict=True):
            assert (a.line, a.position, a.forced) == (b.line, b.position, b.forced)
            assert made.think_tokens[a.think_set].remainder == reader.think_tokens[b.think_set].remainder
    assert write_store(tmp_path / "t", written, made.think_tokens).fingerprint == store.fingerprint
    assert write_store(tmp_path / "u", written[1:], made.think_tokens).fingerprint != store.fingerprint


def test_damaged_store_is_refused(tmp_path: Path, bpe: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    made = builder(bpe)
    write_store(tmp_path / "s", [made.build(CODE)], made.think_tokens)
    with pytest.raises(UserError, match="tokenizer"):
        TrajectoryStore(tmp_path / "s", ThinkTokens(sentencepiece_tokenizer))
    content = (tmp_path / "s" / "ids.bin").read_bytes()
    (tmp_path / "s" / "ids.bin").write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match="changed"):
        TrajectoryStore(tmp_path / "s", made.think_tokens).verify()
    (tmp_path / "s" / "ids.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match="bytes"):
        TrajectoryStore(tmp_path / "s", made.think_tokens)
    (tmp_path / "s" / "columns.json").unlink()
    with pytest.raises(UserError, match="prepare"):
        TrajectoryStore(tmp_path / "s", made.think_tokens)
