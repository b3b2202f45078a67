"""From a question to the ids that a model of one checkpoint reads, and to where its answer ends."""

import json
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.data.tokenizers import Tokenizer, load_folder
from ra3_megatron.evaluation.prompts import Question


class Asker:
    """The tokenizer in a checkpoint's `hf` folder, as `transformers` uses it for prompts.

    Raises UserError when the checkpoint has none, or none that the settings need.
    """

    def __init__(self, checkpoint: Path, settings: EvaluationConfig) -> None:
        self.folder, self._settings = checkpoint / "hf", settings
        if not self.folder.is_dir():
            raise UserError(
                f"checkpoint {checkpoint} has no folder hf with a tokenizer; import the model together with its "
                "tokenizer files, or evaluate a checkpoint that a run has written"
            )
        self.tokenizer: Tokenizer = load_folder(self.folder)
        self.stop_ids = self._stop_ids()
        self._start: list[int] = []
        self._theirs: Any = None
        if settings.prompt == "chat" or settings.start_token == "hf":
            self._theirs = self._load()
        if settings.prompt == "completion" and settings.start_token != "hf":
            start = self.tokenizer.start_id(settings.start_token)
            self._start = [] if start is None else [start]
        if settings.prompt == "chat" and not getattr(self._theirs, "chat_template", None):
            raise UserError(
                f"evaluation.prompt = chat; the tokenizer in {self.folder} has no chat template; use completion, or a "
                "model that was trained to chat"
            )

    def _load(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"transformers cannot load the tokenizer in {self.folder} ({str(error).splitlines()[0]}); set "
                "evaluation.prompt=completion and evaluation.start_token=auto, which do without"
            ) from None

    def _stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those that `generate` would stop at, else the tokenizer's end of text."""
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
                ids = found if isinstance(found, list) else [found]
                inside = [i for i in ids if isinstance(i, int) and 0 <= i < self.tokenizer.vocab_size]
                if inside:
                    return tuple(inside)
        return () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)

    def ids(self, asked: Question) -> list[int]:
        """Ids of a prompt."""
        if self._settings.prompt == "chat":
            messages = [{"role": "system", "content": asked.system}] if asked.system else []
            messages.append({"role": "user", "content": asked.text})
            text = self._theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return [*self._theirs(text, add_special_tokens=False)["input_ids"]]
        if self._settings.start_token == "hf":
            return [*self._theirs(asked.text)["input_ids"]]
        return [*self._start, *self.tokenizer.encode(asked.text)]
