"""Tokenizers behind one small interface that works in ids and bytes.

A segment (a line, a comment) is always encoded by itself and without special tokens, and the bytes of the ids of two
segments are the bytes of the concatenated ids. Tokenizers that put a space before the first word (SentencePiece and its
conversions) have that switched off in our copy, since a segment starts in the middle of a text.
"""

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ra3_megatron.config.data import TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_dir, atomic_write_text

END_OF_TEXT = "<|endoftext|>"

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words that a trained BPE never merges across. It is Qwen's: for a model of type `qwen2`, transformers 5 builds this
splitting whatever tokenizer.json says, so that with any other an exported model would read other ids than it learnt."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_HF_FILES = ("tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab", "merges.txt", "chat_template")
_PROBE = "def f(x):\n    if x:\n\treturn  'é'\n"


class Tokenizer(ABC):
    """Text ↔ ids. `bos_id`, `eos_id`, `pad_id` are None where none is defined; `vocab_size` is max id + 1."""

    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, each encoded by itself, no special tokens (text that looks like one stays text)."""

    @abstractmethod
    def _vocabulary(self) -> list[tuple[str, bytes, bool]]:
        """(piece as the tokenizer spells it, bytes it stands for, is special) per id."""

    @abstractmethod
    def _content(self) -> bytes:
        """What makes this tokenizer this tokenizer, for the fingerprint."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write the tokenizer into `folder` so that `load_tokenizer` finds it again (HF kinds: AutoTokenizer too)."""

    def encode(self, text: str) -> list[int]:
        """Ids of one segment."""
        return self.encode_batch([text])[0]

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """Bytes each id stands for; empty for special tokens and for unused ids. `[vocab_size]`"""
        return tuple(b"" if special else content for _, content, special in self._vocabulary())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which stand for no text."""
        return frozenset(i for i, (_, _, special) in enumerate(self._vocabulary()) if special)

    def token_text(self, token: int) -> str:
        """One token as text to show to people; special tokens by name."""
        piece, content, special = self._vocabulary()[token]
        return piece if special else content.decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids, special tokens left out."""
        table = self.token_bytes
        return b"".join([table[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, hexadecimal."""
        return hashlib.sha256(self._content()).hexdigest()

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise UserError when the model has fewer embedding rows than this tokenizer has ids."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"tokenizer has {self.vocab_size} ids; the model has {model_vocab_size} embedding rows; "
                "use the model's own tokenizer or a model with a larger vocabulary"
            )

    def start_id(self, start_token: str) -> int | None:
        """Id put before every piece for `tokenizer.start_token`. Raises UserError when it does not exist."""
        if start_token == "none":
            return None
        automatic = self.bos_id if self.bos_id is not None else self.eos_id
        found = {"bos": self.bos_id, "eos": self.eos_id, "auto": automatic}[start_token]
        if found is None:
            raise UserError(
                f"tokenizer.start_token = {start_token}; the tokenizer defines no such token; set it to none"
            )
        return found

    def _check_probe(self) -> None:
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"the {self.kind} tokenizer does not give code back unchanged ({_PROBE!r} became "
                f"{self.decode(self.encode(_PROBE))!r}); code needs indentation and line ends kept; use a tokenizer "
                "with bytes as a fallback and without text normalisation"
            )


def _bytes_of_unicode() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in set(printable))})
    return table


def _components(node: Any) -> Iterable[dict]:
    """All dictionaries with a `type` inside one part of a tokenizer.json."""
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for value in node.values():
            yield from _components(value)
    elif isinstance(node, list):
        for value in node:
            yield from _components(value)


def _without_prefix_space(spec: dict) -> dict:
    """Switch off the space that is put before the first word of a text."""
    for part in ("normalizer", "pre_tokenizer"):
        for component in _components(spec.get(part)):
            if component["type"] == "Metaspace":
                component["prepend_scheme"] = "never"
                component.pop("add_prefix_space", None)
            elif component["type"] == "ByteLevel":
                component["add_prefix_space"] = False
            elif component["type"] == "Prepend":
                # An empty prefix is refused by the library; the identity replacement has no effect.
                component.clear()
                component.update({"type": "Replace", "pattern": {"String": "\u2581"}, "content": "\u2581"})
    return spec


class HFTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library (tokenizer.json)."""

    kind = "hf"

    def __init__(self, spec: str, special: dict[str, str | None], source: Path | None = None):
        """`spec`: text of tokenizer.json; `special`: text of `bos_token`, `eos_token`, `pad_token`;
        `source`: folder whose tokenizer files `save` copies. Raises UserError when code does not round-trip."""
        import tokenizers

        self._spec, self._special, self._source = spec, special, source
        parsed = json.loads(spec)
        decoders = {c["type"] for part in ("decoder", "pre_tokenizer") for c in _components(parsed.get(part))}
        self._byte_level = "ByteLevel" in decoders
        if not self._byte_level and not decoders & {"Metaspace", "ByteFallback", "Replace"}:
            raise UserError(
                f"the tokenizer's decoder is {sorted(decoders) or 'missing'}; only byte-level BPE and "
                "SentencePiece-like tokenizers keep code unchanged; use one of those"
            )
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix_space(parsed)))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id, self.pad_id = (self._id_of(special.get(f"{n}_token")) for n in ("bos", "eos", "pad"))
        self._check_probe()

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def __reduce__(self) -> tuple:
        return HFTokenizer, (self._spec, self._special, self._source)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See the base class."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _pieces(self) -> list[tuple[str, bytes, bool]]:
        added = self._backend.get_added_tokens_decoder()
        stand_ins = _bytes_of_unicode()
        table: list[tuple[str, bytes, bool]] = [("", b"", False)] * self.vocab_size
        for piece, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = (piece, added[index].content.encode(), added[index].special)
            elif self._byte_level:
                table[index] = (piece, bytes(stand_ins[c] for c in piece), False)
            elif match := _BYTE_PIECE.fullmatch(piece):
                table[index] = (piece, bytes([int(match[1], 16)]), False)
            else:
                table[index] = (piece, piece.replace("\u2581", " ").encode(), False)
        return table

    def _vocabulary(self) -> list[tuple[str, bytes, bool]]:
        return self._pieces

    def _content(self) -> bytes:
        return json.dumps([json.loads(self._spec), self._special], sort_keys=True).encode()

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and its companions; AutoTokenizer loads the folder."""
        with atomic_dir(folder) as temporary:
            if self._source is not None:
                for file in sorted(self._source.iterdir()):
                    if file.is_file() and file.name.startswith(_HF_FILES):
                        shutil.copyfile(file, temporary / file.name)
            atomic_write_text(temporary / "tokenizer.json", self._spec)
            if not (temporary / "tokenizer_config.json").exists():
                named = {k: v for k, v in self._special.items() if v is not None}
                config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
                atomic_write_text(temporary / "tokenizer_config.json", json.dumps(config, indent=1))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        """`model`: content of the .model file. Raises UserError when it is none or when code does not round-trip."""
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        self._model = model
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            proto.ParseFromString(model)
        except DecodeError as error:
            raise UserError(f"not a SentencePiece model: {error}; give the .model file") from error
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        proto.normalizer_spec.precompiled_charsmap = b""
        proto.normalizer_spec.name = "identity"
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.vocab_size = self._processor.vocab_size()
        ids = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        self.bos_id, self.eos_id, self.pad_id = (i if i >= 0 else None for i in ids)
        self._check_probe()

    def __reduce__(self) -> tuple:
        return SentencePieceTokenizer, (self._model,)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See the base class."""
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    @cached_property
    def _pieces(self) -> list[tuple[str, bytes, bool]]:
        table = []
        for index in range(self.vocab_size):
            piece = self._processor.id_to_piece(index)
            if self._processor.is_byte(index):
                table.append((piece, bytes([int(piece[3:5], 16)]), False))
            else:
                special = self._processor.is_control(index) or self._processor.is_unknown(index)
                table.append((piece, piece.replace("\u2581", " ").encode(), special))
        return table

    def _vocabulary(self) -> list[tuple[str, bytes, bool]]:
        return self._pieces

    def _content(self) -> bytes:
        return self._model

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.model`."""
        with atomic_dir(folder) as temporary:
            (temporary / "tokenizer.model").write_bytes(self._model)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Byte-level BPE trained on `texts`: deterministic; `<|endoftext|>` is its bos, eos and pad token (id 0)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HFTokenizer(tokenizer.to_str(), dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT))


def _special_tokens(folder: Path) -> dict[str, str | None]:
    """Texts of the bos, eos and pad tokens from a tokenizer folder's configuration files."""
    found: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in ("bos_token", "eos_token", "pad_token"):
                value = config.get(key)
                found[key] = value["content"] if isinstance(value, dict) else value or found.get(key)
    return found


def _load_hf(path: str) -> HFTokenizer:
    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        return HFTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), _special_tokens(folder), folder)
    from transformers import AutoTokenizer

    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        # transformers makes an empty tokenizer from config.json alone.
        raise UserError(
            f"tokenizer.path = {path}; the folder has no tokenizer.json, tokenizer.model or vocab.json; "
            "copy the tokenizer's files there, or set data.tokenizer.path"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.path = {path}; no tokenizer.json there and nothing on the hub ({str(error).splitlines()[0]}); "
            "give a folder with tokenizer.json or a hub name that can be reached"
        ) from error
    return from_transformers(loaded)


def from_transformers(loaded: Any) -> HFTokenizer:
    """Our tokenizer from a fast tokenizer of transformers. Raises UserError for a slow one."""
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(loaded).__name__} has no fast version; convert it to tokenizer.json, or use kind: sentencepiece"
        )
    special = {k: getattr(loaded, k) for k in ("bos_token", "eos_token", "pad_token")}
    return HFTokenizer(backend.to_str(), special)


def load_tokenizer(config: TokenizerConfig, corpus: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `config` names; `corpus` (texts) is needed for `train_bpe` only.

    Raises UserError for missing files and for tokenizers that change code.
    """
    if config.kind == "train_bpe":
        if corpus is None:
            raise UserError("tokenizer.kind = train_bpe; no corpus was given to train on; prepare the corpus first")
        return train_bpe(corpus, config.vocab_size)
    if config.path is None:
        raise UserError(
            f"tokenizer.kind = {config.kind}; neither tokenizer.path nor a base model that brings its own tokenizer is "
            "given; set tokenizer.path to a local folder or hub name"
        )
    return load_folder(config.path) if config.kind == "hf" else _load_sentencepiece(Path(config.path))


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    path = path / "tokenizer.model" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"tokenizer.path = {path}; there is no such file; give the SentencePiece .model file")
    return SentencePieceTokenizer(path.read_bytes())


def load_folder(path: Path | str) -> Tokenizer:
    """A tokenizer from a folder written by `Tokenizer.save`, a Hugging Face folder or a hub name."""
    folder = Path(path)
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return _load_sentencepiece(folder)
    return _load_hf(str(path))
