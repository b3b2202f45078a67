"""Ids of prompts: those that transformers gives, with or without a start token, or in a chat template."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.data.tokenizers import train_bpe
from ra3_megatron.evaluation.asking import Asker
from ra3_megatron.evaluation.prompts import Question

ASKED = Question("def f(x):\n    ", system="Be brief.")
TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    train_bpe(["def f(x):\n    return x\nuser: system: assistant: Be brief.\n"] * 3, 300).save(folder / "hf")
    return folder


def test_ids_are_those_of_transformers(checkpoint: Path) -> None:
    """An exported model read other ids here than in `generate`, and answered otherwise."""
    theirs = AutoTokenizer.from_pretrained(str(checkpoint / "hf"))(ASKED.text)["input_ids"]
    assert Asker(checkpoint, EvaluationConfig()).ids(ASKED) == list(theirs)


def test_start_token(checkpoint: Path) -> None:
    """A model that was trained here never saw a text without its start token."""
    plain = Asker(checkpoint, EvaluationConfig(start_token="none"))
    start = plain.tokenizer.bos_id
    assert Asker(checkpoint, EvaluationConfig(start_token="auto")).ids(ASKED) == [start, *plain.ids(ASKED)]


def test_chat_template_and_its_special_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """Special tokens of the template became ordinary text."""
    with pytest.raises(UserError, match="no chat template"):
        Asker(checkpoint, EvaluationConfig(prompt="chat"))
    folder = tmp_path / "chat"
    train_bpe(["user system assistant"] * 3, 300).save(folder / "hf")
    path = folder / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    asker = Asker(folder, EvaluationConfig(prompt="chat"))
    ids = asker.ids(ASKED)
    assert ids.count(asker.tokenizer.eos_id) == 2
    assert asker.tokenizer.decode(ids) == "system: Be brief.\nuser: def f(x):\n    \nassistant: "


def test_an_answer_ends_where_generate_would_end_it(checkpoint: Path, tmp_path: Path) -> None:
    """A chat model's turn ends with another token than its tokenizer's end of text."""
    assert Asker(checkpoint, EvaluationConfig()).stop_ids == (0,)
    folder = tmp_path / "other"
    train_bpe(["abc"], 300).save(folder / "hf")
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 9, 99999]}')
    assert Asker(folder, EvaluationConfig()).stop_ids == (7, 9)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """The error was about a file that nobody had named."""
    with pytest.raises(UserError, match="no folder hf with a tokenizer"):
        Asker(tmp_path, EvaluationConfig())
