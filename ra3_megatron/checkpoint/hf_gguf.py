"""Import weights from a GGUF file (llama.cpp): dequantised, with Hugging Face's names and head order.

Dequantised weights are those of the quantised model: what llama.cpp computes with, not what was trained.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import _type_traits as decodable
from torch import Tensor

from ra3_megatron.checkpoint.hf_mapping import EMBEDDING, LM_HEAD, Shape
from ra3_megatron.config.architecture import FAMILIES, MIXTURES, Architecture
from ra3_megatron.config.errors import UserError

_OUTER = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": LM_HEAD,
}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all Llama 3.x models have in common; GGUF stores the resulting factors only."""


def _row_major(entry: Any) -> Shape:
    """Shape of a GGUF tensor, which names its fastest axis first."""
    return tuple(int(n) for n in reversed(entry.shape))


def _hf_name(name: str) -> str:
    """GGUF tensor name → Hugging Face name; an unknown name is kept, to be reported as extra."""
    if name in _OUTER:
        return _OUTER[name]
    match = _BLOCK.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}"
    return name


class GGUFFile:
    """A model in one GGUF file. Raises UserError for a missing, truncated, foreign or split file at construction."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.where = str(path)
        self._reader = self._open()
        self._fields = self._reader.fields
        self._tensors = {_hf_name(t.name): t for t in self._reader.tensors if t.name != _ROPE_FACTORS}
        self._rope_factors = next((t for t in self._reader.tensors if t.name == _ROPE_FACTORS), None)
        self._check_quantisation()
        self._config = self._read_config()
        self._architecture = Architecture.from_hf(self._config, self.where)

    def _open(self) -> Any:
        if not self.path.is_file():
            raise UserError(f"no model at {self.path}: the file does not exist; check the path")
        if re.search(r"-\d{5}-of-\d{5}\.gguf$", self.path.name):
            raise UserError(
                f"{self.path} is one part of a split GGUF; join the parts with llama.cpp's gguf-split first"
            )
        size = self.path.stat().st_size
        try:
            reader = gguf.GGUFReader(self.path)
            end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise UserError(
                f"{self.path} ({size} bytes) is not a complete GGUF file ({error}); copy the file again"
            ) from None
        if end > size:  # numpy clips the last tensors of a memory map without a word
            raise UserError(
                f"{self.path} is truncated: its tensors end at byte {end}, the file at {size}; copy it again"
            )
        return reader

    def _check_quantisation(self) -> None:
        plain = {"F32", "F16", "F64"}
        kinds = {t.tensor_type for t in self._tensors.values()}
        unknown = sorted(kind.name for kind in kinds if kind.name not in plain and kind not in decodable)
        if unknown:
            raise UserError(
                f"{self.where}: quantisation {', '.join(unknown)} cannot be decoded by the installed gguf package; "
                "upgrade it or use another quantisation of the model"
            )

    # ---------------------------------------------------------------- configuration

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def _read_config(self) -> dict[str, Any]:
        family = self._field("general.architecture")
        dense = [name for name in FAMILIES if name not in MIXTURES]
        if family not in dense:
            raise UserError(
                f"{self.where}: architecture '{family}' cannot be imported from GGUF; choose a model of "
                f"{', '.join(dense)}, or the Hugging Face folder of this one"
            )

        def need(key: str) -> Any:
            value = self._field(f"{family}.{key}")
            if value is None:
                raise UserError(f"{self.where}: GGUF metadata {family}.{key} is missing; convert the model again")
            return value

        heads, hidden = need("attention.head_count"), need("embedding_length")
        config = {
            "architectures": [FAMILIES[family]],
            "model_type": family,
            "num_hidden_layers": need("block_count"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": self._field(f"{family}.attention.head_count_kv", heads),
            "head_dim": self._field(f"{family}.attention.key_length", hidden // heads),
            "intermediate_size": need("feed_forward_length"),
            "vocab_size": int(self._tensors[EMBEDDING].shape[1]) if EMBEDDING in self._tensors else need("vocab_size"),
            "tie_word_embeddings": LM_HEAD not in self._tensors,
            "rope_theta": self._field(f"{family}.rope.freq_base", 10000.0),
            "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": need("context_length"),
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
        }
        for name in ("bos", "eos"):
            token = self._field(f"tokenizer.ggml.{name}_token_id")
            if token is not None:
                config[f"{name}_token_id"] = int(token)
        if family == "llama":
            config["attention_bias"] = False
        scaling = self._field(f"{family}.rope.scaling.type", "none")
        if scaling not in ("none", ""):
            raise UserError(f"{self.where}: rope scaling '{scaling}' is not mapped; import the Hugging Face model")
        if self._rope_factors is not None:
            config["rope_scaling"] = self._llama3_scaling(config)
        return config

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """Recover Llama 3's scaling from the per-frequency factors, or refuse."""
        assert self._rope_factors is not None
        found = torch.from_numpy(self._rope_factors.data.copy()).double()
        factor = float(found.max())
        width = config["head_dim"]
        frequency = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        wavelength = 2 * torch.pi / frequency
        low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
        original = _LLAMA3_ROPE["original_max_position_embeddings"]
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
            raise UserError(
                f"{self.where}: {_ROPE_FACTORS} is not Llama 3's scaling; import the Hugging Face model instead"
            )
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}

    # ---------------------------------------------------------------- Source

    def architecture(self) -> Architecture:
        return self._architecture

    def shapes(self) -> dict[str, Shape]:
        return {name: _row_major(t) for name, t in self._tensors.items()}

    def stored_dtype(self) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        """Dequantise one tensor; `[rows, columns]` float32."""
        entry = self._tensors[name]
        values = gguf.quants.dequantize(entry.data, entry.tensor_type)
        tensor = torch.from_numpy(values.astype("float32", copy=True)).reshape(_row_major(entry))
        arch = self._architecture
        if arch.family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: undo the reordering of rows.
            heads = arch.num_heads if name.endswith("q_proj.weight") else arch.num_kv_heads
            rows = tensor.reshape(heads, arch.head_dim // 2, 2, -1)
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def fingerprint(self) -> str:
        stat = self.path.stat()
        return hashlib.sha256(f"{self.path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    def write_side_files(self, folder: Path) -> None:
        """Write config.json, generation_config.json and the tokenizer rebuilt from the GGUF metadata."""
        from transformers import AutoTokenizer  # seconds to import, needed nowhere else

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self._config, indent=2), encoding="utf-8")
        generation = {key: value for key, value in self._config.items() if key.endswith("_token_id")}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            raise UserError(
                f"{self.where}: transformers cannot rebuild the tokenizer ({str(error).splitlines()[0]}); "
                "import the Hugging Face model instead"
            ) from None
        tokenizer.save_pretrained(str(folder))


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32 value: GGUF's 9.999999747378752e-06 is a rounded 1e-5."""
    return float(str(np.float32(value)))
