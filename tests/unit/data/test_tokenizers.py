"""Tokenizers: ids and bytes add up over segments, folders load again, wrong ones are refused."""

import io
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ra3_megatron.config.data import TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.tokenizers import HFTokenizer, Tokenizer, load_folder, load_tokenizer, train_bpe

CHARACTERS = st.characters(exclude_characters="▁", exclude_categories=("Cs",))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.text(CHARACTERS, max_size=12), max_size=4))
def test_segments_concatenate(parts: list[str], tokenizer: Tokenizer) -> None:
    """decode(a + b) = decode(a) + decode(b): no space is put before a segment, none is cleaned up."""
    # SmolLM2's vocabulary lacks some bytes (control characters, F1 and up): such text is dropped and counted.
    singles = {content for content in tokenizer.token_bytes if len(content) == 1}
    assume(all(bytes([b]) in singles for b in "".join(parts).encode()))
    ids = [i for part in parts for i in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == "".join(parts)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not set(ids) & tokenizer.special_ids


def test_text_that_looks_special_stays_text(tokenizer: Tokenizer) -> None:
    """Source code that mentions `<|endoftext|>` must not end the document."""
    for text in ("<|endoftext|>", "<|im_start|>x", "</s>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & tokenizer.special_ids
        assert tokenizer.decode(ids) == text


def test_saved_folder_loads_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t")
    again = load_folder(tmp_path / "t")
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "def f():\n\treturn 'é'  # x\n"
    for other in (again, copy):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode(text) == tokenizer.encode(text)
        assert (other.bos_id, other.eos_id, other.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_transformers_reads_what_we_save(tmp_path: Path, bpe: Tokenizer) -> None:
    from transformers import AutoTokenizer

    bpe.save(tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded("    return x\n")["input_ids"] == bpe.encode("    return x\n")
    assert (loaded.eos_token_id, loaded.bos_token_id) == (bpe.eos_id, bpe.bos_id)


def test_training_is_deterministic(stdlib_texts: list[str]) -> None:
    one, two = (train_bpe(stdlib_texts[:4], 400) for _ in range(2))
    assert one.fingerprint == two.fingerprint != train_bpe(stdlib_texts[4:8], 400).fingerprint
    assert one.vocab_size == 400


def llama2_like() -> dict:
    """A converted SentencePiece tokenizer as Llama 2 ships it: a normaliser that puts a space first, byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for piece in ("▁", "x", "▁x", "=", "▁=", "#", "▁#", "▁▁", "1", "▁1"):
        vocab[piece] = len(vocab)
    specials = [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for c, i in (("<unk>", 0), ("<s>", 1), ("</s>", 2))
    ]  # fmt: skip
    merges = [["▁", "x"], ["▁", "="], ["▁", "#"], ["▁", "▁"], ["▁", "1"]]
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "added_tokens": specials,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


def test_llama2_prefix_space_is_off() -> None:
    """A converted SentencePiece tokenizer would put a space before every line."""
    tokenizer = HFTokenizer(json.dumps(llama2_like()), {"bos_token": "<s>", "eos_token": "</s>"})
    ids = [i for part in ("x = 1\n", "  # é\n", "x") for i in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == "x = 1\n  # é\nx"
    assert [tokenizer.token_text(i) for i in tokenizer.encode("x = 1")] == ["x", " =", " 1"]
    assert (tokenizer.bos_id, tokenizer.token_text(1)) == (1, "<s>")


def test_wrong_tokenizers_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    """Each message names what was found; nothing falls back to another tokenizer."""
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(TokenizerConfig("sentencepiece", str(tmp_path / "none.model")))
    (tmp_path / "bad.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(TokenizerConfig("sentencepiece", str(tmp_path / "bad.model")))
    with pytest.raises(UserError, match="embedding rows"):
        bpe.check_fits(bpe.vocab_size - 1)
    bpe.check_fits(bpe.vocab_size)
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    with pytest.raises(UserError, match="unchanged"):
        HFTokenizer(json.dumps(llama2_like() | {"normalizer": strip}), {})
    with pytest.raises(UserError, match=r"neither tokenizer\.path"):
        load_tokenizer(TokenizerConfig("hf"))
    with pytest.raises(UserError, match="no corpus"):
        load_tokenizer(TokenizerConfig("train_bpe"))


def test_sentencepiece_that_eats_line_ends_is_refused() -> None:
    """SentencePiece's own defaults fold white space; without byte fallback a line end becomes unknown."""
    import sentencepiece

    from ra3_megatron.data.tokenizers import SentencePieceTokenizer

    model = io.BytesIO()
    rows = iter([f"def f{i}(x): return x + {i}" for i in range(300)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=rows, model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    with pytest.raises(UserError, match="unchanged"):
        SentencePieceTokenizer(model.getvalue())


def test_start_token(bpe: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    assert sentencepiece_tokenizer.start_id("auto") == sentencepiece_tokenizer.bos_id != sentencepiece_tokenizer.eos_id
    assert bpe.start_id("none") is None
    spec = json.dumps(llama2_like())
    assert HFTokenizer(spec, {"eos_token": "</s>"}).start_id("auto") == 2
    with pytest.raises(UserError, match="no such token"):
        HFTokenizer(spec, {"eos_token": "</s>"}).start_id("bos")
