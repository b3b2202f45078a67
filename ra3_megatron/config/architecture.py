"""The shape of a language model: what Hugging Face's `config.json` says, in our terms, and back.

Plain numbers only, so that a dry run can count parameters and bytes without torch.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""Model families with an own mapping: Hugging Face `model_type` → architecture class."""

MIXTURES = ("qwen3_moe",)
"""Families whose MLPs are mixtures of experts."""


_NUMBERS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "num_experts", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
"""Fields of `config.json` that are numbers."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent scaling of rotary embeddings."""

    factor: float
    """Factor by which low frequencies are stretched."""
    low_freq_factor: float = 1.0
    """Wavelengths above `original_max_position / low_freq_factor` are stretched in full."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_max_position / high_freq_factor` are left alone."""
    original_max_position: int = 8192
    """Context length of the pre-training, tokens."""


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only transformer with RMSNorm, SwiGLU, rotary positions and grouped-query attention.

    With experts, every layer's MLP is a mixture: a router picks some of them for each token, and none is ever dropped,
    so that a log-probability depends on the sequence alone.
    """

    family: str = "qwen2"
    """`llama` (Llama 2, 3.x), `qwen2` (Qwen2, Qwen2.5), `qwen3` or `qwen3_moe`."""
    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_heads: int = 6
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads."""
    head_dim: int = 32
    """Width of one head."""
    ffn_hidden_size: int = 512
    """Width of the gated MLP; of a mixture what config.json says of layers without experts: it has none such."""
    vocab_size: int = 4096
    """Rows of the embedding as in Hugging Face's config, before Megatron's padding."""
    tied_embeddings: bool = True
    """Whether the output layer shares the embedding's weight."""
    qkv_bias: bool = True
    """Bias on the query, key and value projections."""
    qk_norm: bool = False
    """RMSNorm over each query and key head (Qwen3)."""
    rope_base: float = 10000.0
    """Base of the rotary embedding."""
    rope_scaling: RopeScaling | None = None
    """Llama 3 scaling, or none."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    max_positions: int = 2048
    """Longest sequence the model is declared for, tokens."""
    num_experts: int = 0
    """Experts of every layer; 0 = a dense MLP."""
    experts_per_token: int = 0
    """Experts that see a token: those the router finds the most probable."""
    expert_ffn_hidden_size: int = 0
    """Width of one expert's gated MLP."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are made to sum to 1; else they are the router's probabilities."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"model family '{self.family}' is not mapped; choose one of {', '.join(FAMILIES)}")
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_hidden_size",
            "vocab_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model.architecture.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.architecture.num_heads ({self.num_heads}) % num_kv_heads ({self.num_kv_heads}) is not 0; "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.architecture.head_dim ({self.head_dim}) is odd; rotary embeddings need an even width"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        names = ("num_experts", "experts_per_token", "expert_ffn_hidden_size")
        found = ", ".join(f"{name} {getattr(self, name)}" for name in names)
        if self.family not in MIXTURES:
            if any(getattr(self, name) for name in names):
                raise UserError(
                    f"model.architecture of family {self.family} has {found}; only {', '.join(MIXTURES)} has experts; "
                    "set these to 0"
                )
            return
        if not 1 <= self.experts_per_token <= self.num_experts or self.expert_ffn_hidden_size < 1:
            raise UserError(
                f"model.architecture of family {self.family} has {found}; give at least one expert per token, no more "
                "than there are, and their width"
            )
        if self.experts_per_token == 1 and self.norm_topk_prob:
            raise UserError(
                "model.architecture.experts_per_token is 1 with norm_topk_prob; the one weight would always be 1 and "
                "the router would learn nothing; set norm_topk_prob to false"
            )

    @property
    def mlp_parameters(self) -> int:
        """Weights of one layer's MLP: of all its experts, without the router."""
        return 3 * self.hidden_size * (self.num_experts * self.expert_ffn_hidden_size or self.ffn_hidden_size)

    @property
    def inactive_parameters(self) -> int:
        """Weights that one token does not meet: the experts that the router does not pick for it."""
        idle = self.num_experts - self.experts_per_token
        return self.num_layers * 3 * self.hidden_size * idle * self.expert_ffn_hidden_size

    @property
    def parameter_count(self) -> int:
        """Number of weights without vocabulary padding; tied embeddings count once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        if self.qk_norm:
            attention += 2 * self.head_dim
        layer = attention + self.mlp_parameters + self.num_experts * self.hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, mean_attended: float) -> float:
        """Floating-point operations of forward and backward per token: 6 per matrix weight plus attention.

        `mean_attended` is the mean number of keys a query attends to (half the sequence length for causal attention).
        The embedding look-up costs none; the output layer does, tied or not. Of the experts, those of a token count.
        """
        matrices = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        matrices += (
            3 * self.hidden_size * (self.experts_per_token * self.expert_ffn_hidden_size or self.ffn_hidden_size)
        )
        matrices += self.num_experts * self.hidden_size
        attention = 2 * 2 * self.num_heads * self.head_dim * mean_attended
        return 3 * (self.num_layers * (2 * matrices + attention) + 2 * self.hidden_size * self.vocab_size)

    # ---------------------------------------------------------------- Hugging Face

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config.json") -> "Architecture":
        """Read a Hugging Face configuration (transformers 4 or 5 layout).

        Raises UserError for a family or a variant that the mapping does not cover: nothing is ignored that would
        change the logits.
        """
        if not isinstance(config, dict):
            raise UserError(f"{where}: holds no JSON object; is this the config.json of a model? copy it again")
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"{where}: model_type '{family}' has no mapping; mapped are {', '.join(FAMILIES)}; use one of these "
                "or add the family's rules to ra3_megatron/checkpoint/hf_mapping.py"
            )
        _refuse_variants(config, family, where)
        try:
            heads = config["num_attention_heads"]
            hidden = config["hidden_size"]
            return cls(
                family=family,
                num_layers=config["num_hidden_layers"],
                hidden_size=hidden,
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
                ffn_hidden_size=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
                qk_norm=family in ("qwen3", "qwen3_moe"),
                rope_base=_rope_base(config),
                rope_scaling=_rope_scaling(config, where),
                norm_eps=config.get("rms_norm_eps", 1e-6),
                max_positions=config.get("max_position_embeddings", 2048),
                **(_experts(config) if family in MIXTURES else {}),
            )
        except KeyError as missing:
            raise UserError(
                f"{where}: field {missing} is missing; is this the config.json of a {family} model?"
            ) from None
        except (TypeError, AttributeError) as error:
            words = ", ".join(
                f"{k} = {config[k]!r}"
                for k in _NUMBERS
                if k in config and not isinstance(config[k], int | float | None)
            )
            raise UserError(f"{where}: a field has the wrong type ({words or error}); copy the model again") from None

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Architecture":
        """Read `config.json` of a Hugging Face folder."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"no Hugging Face model at {folder}: {path} does not exist; give a folder with config.json"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); copy the model again") from None
        return cls.from_hf(config, str(path))

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The Hugging Face configuration of this shape, readable by transformers 4.45 and later."""
        config: dict[str, Any] = {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_hidden_size,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied_embeddings,
            "rope_theta": self.rope_base,
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "torch_dtype": dtype,
        }
        if self.family != "qwen2":
            config["attention_bias"] = self.qkv_bias
        if self.num_experts:
            config |= {
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                "moe_intermediate_size": self.expert_ffn_hidden_size,
                "norm_topk_prob": self.norm_topk_prob,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if self.rope_scaling is not None:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_position,
            }
        return config

    # ---------------------------------------------------------------- plain data

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML or JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Architecture":
        """Inverse of `to_dict`."""
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise UserError(f"architecture has unknown fields {sorted(unknown)}; known are {sorted(known)}")
        data = dict(data)
        if data.get("rope_scaling") is not None:
            data["rope_scaling"] = RopeScaling(**data["rope_scaling"])
        return cls(**data)


def _refuse_variants(config: dict[str, Any], family: str, where: str) -> None:
    """Raise for settings that change the forward pass and that the mapping does not carry."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{where}: hidden_act '{activation}' is not supported; only 'silu' (SwiGLU) models are mapped")
    windows = config.get("use_sliding_window")
    if windows and (family in MIXTURES or config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)):
        raise UserError(f"{where}: use_sliding_window is true; sliding-window attention is not mapped")
    if config.get("mlp_bias"):
        raise UserError(f"{where}: mlp_bias is true; biases in the MLP are not mapped")
    if family == "llama" and config.get("attention_bias"):
        raise UserError(f"{where}: attention_bias is true on a llama model (it also biases o_proj); this is not mapped")
    if family in ("qwen3", "qwen3_moe") and config.get("attention_bias"):
        raise UserError(f"{where}: attention_bias is true on a {family} model; this is not mapped")
    if family in MIXTURES and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        raise UserError(
            f"{where}: decoder_sparse_step is {config.get('decoder_sparse_step', 1)} and mlp_only_layers "
            f"{config.get('mlp_only_layers') or []}; some layers have no experts, which is not mapped; only models "
            "with experts in every layer (1 and []) are"
        )
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: the model is quantised (quantization_config); import the full-precision weights instead"
        )


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a mixture; transformers 5 may write `num_local_experts`."""
    return {
        "num_experts": config["num_experts" if "num_experts" in config else "num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_ffn_hidden_size": config["moe_intermediate_size"],
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def _rope_base(config: dict[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _rope_scaling(config: dict[str, Any], where: str) -> RopeScaling | None:
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling '{kind}' is not mapped; only Llama 3's ('llama3') is")
    return RopeScaling(
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_position=int(scaling["original_max_position_embeddings"]),
    )
