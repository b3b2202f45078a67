"""Hugging Face tensors ↔ Megatron tensors: a short declarative list of reversible rules per model family.

A rule ties one full (never sharded) Megatron tensor to the Hugging Face tensors it is made of. Megatron's names are
those of Transformer Engine's layer spec, where the norm in front of a projection belongs to that projection. Sharding
over TP and PP is none of this module's business: the full tensors are written once and every layout loads its part.

Adding a family: add its row to `ra3_megatron.config.architecture.FAMILIES` and, where it differs, a rule to
`layer_rules` or `expert_rules`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError

Shape = tuple[int, ...]

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias")
"""Hugging Face tensors that carry no weights: old buffers, recomputed from the configuration."""

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Megatron tensors whose rows may be padded; the padding lies behind the last real row."""


@dataclass(frozen=True)
class Rule(ABC):
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str
    """Megatron's name; inside a layer it comes after `decoder.layers.`, inside an expert after the experts' prefix."""

    @abstractmethod
    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        """Hugging Face name (inside a layer: after `model.layers.<i>.`, inside an expert: after `mlp.experts.<i>.`) →
        shape, in the order `merge` wants them."""

    @abstractmethod
    def shape(self, arch: Architecture) -> Shape:
        """Shape of the full Megatron tensor."""

    @abstractmethod
    def merge(self, parts: Sequence[Tensor], arch: Architecture) -> Tensor:
        """Hugging Face tensors → the Megatron tensor."""

    @abstractmethod
    def split(self, tensor: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
        """The Megatron tensor → Hugging Face tensors; exact inverse of `merge`."""


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name; `dims` names fields of the architecture (or widths derived from them)."""

    hf: str
    dims: tuple[str, ...]

    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        return {self.hf: self.shape(arch)}

    def shape(self, arch: Architecture) -> Shape:
        return tuple(_width(arch, name) for name in self.dims)

    def merge(self, parts: Sequence[Tensor], arch: Architecture) -> Tensor:
        return parts[0]

    def split(self, tensor: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
        return (tensor,)


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value projections interleaved by group: `[q … q, k, v]` per key/value head.

    With H query heads, G key/value heads and width d, a group holds H/G query heads, one key and one value head, so
    that cutting the first axis evenly hands whole groups to each tensor-parallel rank.
    """

    kind: str
    """`weight` (`[rows, hidden]`) or `bias` (`[rows]`)."""

    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        tail = (arch.hidden_size,) if self.kind == "weight" else ()
        heads = {"q": arch.num_heads, "k": arch.num_kv_heads, "v": arch.num_kv_heads}
        return {f"self_attn.{p}_proj.{self.kind}": (n * arch.head_dim, *tail) for p, n in heads.items()}

    def shape(self, arch: Architecture) -> Shape:
        rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
        return (rows, arch.hidden_size) if self.kind == "weight" else (rows,)

    def merge(self, parts: Sequence[Tensor], arch: Architecture) -> Tensor:
        groups = [part.reshape(arch.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).reshape(self.shape(arch))

    def split(self, tensor: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
        per_group = arch.num_heads // arch.num_kv_heads * arch.head_dim
        groups = tensor.reshape(arch.num_kv_heads, -1, *tensor.shape[1:])
        parts = groups.split([per_group, arch.head_dim, arch.head_dim], dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in parts)


@dataclass(frozen=True)
class GateUp(Rule):
    """SwiGLU's gate and up projections, one above the other: `[2 · ffn, hidden]`; `width` names ffn's field."""

    gate: str
    up: str
    width: str = "ffn_hidden_size"

    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        half = (_width(arch, self.width), arch.hidden_size)
        return {self.gate: half, self.up: half}

    def shape(self, arch: Architecture) -> Shape:
        return (2 * _width(arch, self.width), arch.hidden_size)

    def merge(self, parts: Sequence[Tensor], arch: Architecture) -> Tensor:
        return torch.cat(tuple(parts))

    def split(self, tensor: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
        gate, up = tensor.chunk(2)
        return gate, up


def _width(arch: Architecture, name: str) -> int:
    return arch.num_heads * arch.head_dim if name == "attention" else getattr(arch, name)


def layer_rules(arch: Architecture) -> tuple[Rule, ...]:
    """Rules of one transformer layer."""
    rules: list[Rule] = [
        Rename("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", ("hidden_size",)),
        QKV("self_attention.linear_qkv.weight", "weight"),
        Rename("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden_size", "attention")),
    ]
    if arch.num_experts:
        # The router sees the normalised tokens too, so that the norm belongs to no projection.
        rules += [
            Rename("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("hidden_size",)),
            Rename("mlp.router.weight", "mlp.gate.weight", ("num_experts", "hidden_size")),
        ]
    else:
        rules += [
            Rename("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", ("hidden_size",)),
            GateUp("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
            Rename("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("hidden_size", "ffn_hidden_size")),
        ]
    if arch.qkv_bias:
        rules.append(QKV("self_attention.linear_qkv.bias", "bias"))
    if arch.qk_norm:
        rules.append(Rename("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", ("head_dim",)))
        rules.append(Rename("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", ("head_dim",)))
    return tuple(rules)


def expert_rules() -> tuple[Rule, ...]:
    """Rules of one expert."""
    width = "expert_ffn_hidden_size"
    return (
        GateUp("linear_fc1.weight", "gate_proj.weight", "up_proj.weight", width),
        Rename("linear_fc2.weight", "down_proj.weight", ("hidden_size", width)),
    )


def outer_rules(arch: Architecture) -> tuple[Rule, ...]:
    """Rules outside the layers; a tied model has no output layer of its own."""
    vocabulary = ("vocab_size", "hidden_size")
    rules: list[Rule] = [
        Rename(VOCABULARY_KEYS[0], EMBEDDING, vocabulary),
        Rename("decoder.final_layernorm.weight", "model.norm.weight", ("hidden_size",)),
    ]
    if not arch.tied_embeddings:
        rules.append(Rename(VOCABULARY_KEYS[1], LM_HEAD, vocabulary))
    return tuple(rules)


@dataclass(frozen=True)
class Unit:
    """A rule at its place in the model: one Megatron tensor of one layer, of one expert of a layer, or outside."""

    rule: Rule
    layer: int | None = None
    """Layer index over the whole model, or None outside the layers."""
    expert: int | None = None
    """Expert index over the whole layer, or None outside the experts."""

    @property
    def _inside(self) -> str:
        """Megatron's checkpoint key after the layer."""
        return self.rule.megatron if self.expert is None else f"mlp.experts.experts.{self.rule.megatron}"

    @property
    def key(self) -> str:
        """Megatron's checkpoint key; layers and experts of a key share one tensor with these as its first axes."""
        return self._inside if self.layer is None else f"decoder.layers.{self._inside}"

    @property
    def layer_key(self) -> str:
        """Key where every layer is stored by itself, which Megatron can do too."""
        return self._inside if self.layer is None else f"decoder.layers.{self.layer}.{self._inside}"

    @property
    def at(self) -> tuple[int, ...]:
        """Place on the first axes of the tensor `key`."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    def axes(self, arch: Architecture) -> tuple[int, ...]:
        """Lengths of these axes."""
        return (arch.num_layers, arch.num_experts)[: len(self.at)]

    @property
    def names(self) -> tuple[str, ...]:
        """Megatron's parameter name in a whole model: of experts one after the other, or grouped."""
        if self.expert is None:
            return (self.layer_key,)
        prefix = f"decoder.layers.{self.layer}.mlp.experts."
        return (
            f"{prefix}local_experts.{self.expert}.{self.rule.megatron}",
            f"{prefix}{self.rule.megatron}{self.expert}",
        )

    @property
    def name(self) -> str:
        """What people are told."""
        return self.names[0]

    def hf_shapes(self, arch: Architecture) -> dict[str, Shape]:
        """Full Hugging Face names → shapes."""
        prefix = "" if self.layer is None else f"model.layers.{self.layer}."
        prefix += "" if self.expert is None else f"mlp.experts.{self.expert}."
        return {prefix + name: shape for name, shape in self.rule.hf_shapes(arch).items()}


def units(arch: Architecture) -> Iterator[Unit]:
    """Every Megatron tensor of the model: embedding first, then layer by layer, then the rest."""
    first, *rest = outer_rules(arch)
    yield Unit(first)
    for layer in range(arch.num_layers):
        for rule in layer_rules(arch):
            yield Unit(rule, layer)
        for expert in range(arch.num_experts):
            for rule in expert_rules():
                yield Unit(rule, layer, expert)
    for rule in rest:
        yield Unit(rule)


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Every Hugging Face tensor of the model → shape, in the order of `units`."""
    return {name: shape for unit in units(arch) for name, shape in unit.hf_shapes(arch).items()}


def live_hf_tensors(parameters: Mapping[str, Tensor], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of a model in memory that is not split over processes, in its dtype.

    `parameters` by Megatron's names, the vocabulary's padding included; the tensors share memory with them where the
    rule allows. Raises KeyError for a missing one.
    """
    for unit in units(arch):
        found = next((name for name in unit.names if name in parameters), unit.name)
        tensor = parameters[found].detach()
        if unit.key in VOCABULARY_KEYS:
            tensor = tensor[: arch.vocab_size]
        yield from zip(unit.hf_shapes(arch), unit.rule.split(tensor, arch), strict=True)


@dataclass(frozen=True)
class TensorDifferences:
    """How a set of Hugging Face tensors differs from what the architecture asks for."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[str, ...]
    """Lines `name: found …, expected …`."""
    ignored: tuple[str, ...]
    """Names on the explicit ignore list (rotary buffers; a tied model's stored output layer)."""

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, extra or mis-shaped."""
        return not (self.missing or self.extra or self.misshaped)

    def describe(self, limit: int = 8) -> str:
        """One line that names up to `limit` tensors of each kind."""
        parts = []
        for kind in ("missing", "extra", "misshaped"):
            names = getattr(self, kind)
            if names:
                more = f" and {len(names) - limit} more" if len(names) > limit else ""
                parts.append(f"{len(names)} {kind} ({', '.join(names[:limit])}{more})")
        return "; ".join(parts) or "none"


def compare_tensors(found: Mapping[str, Shape], arch: Architecture) -> TensorDifferences:
    """Compare the tensors of a Hugging Face model (name → shape) with those `arch` is made of."""
    expected = hf_shapes(arch)
    ignored = {name for name in found if name.endswith(IGNORED_SUFFIXES)}
    if arch.tied_embeddings and LM_HEAD in found and found[LM_HEAD] == expected[EMBEDDING]:
        ignored.add(LM_HEAD)  # its equality with the embedding is checked by who reads the data
    return TensorDifferences(
        missing=tuple(name for name in expected if name not in found),
        extra=tuple(sorted(name for name in found if name not in expected and name not in ignored)),
        misshaped=tuple(
            f"{name}: found {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ),
        ignored=tuple(sorted(ignored)),
    )


def check_tensors(found: Mapping[str, Shape], arch: Architecture, where: str) -> TensorDifferences:
    """Like `compare_tensors`; raise UserError when anything is missing, extra or mis-shaped."""
    differences = compare_tensors(found, arch)
    if not differences.ok:
        raise UserError(
            f"{where}: the tensors do not match config.json ({arch.family}, {arch.num_layers} layers): "
            f"{differences.describe()}; get a complete copy of the model whose config.json belongs to its weights"
        )
    return differences
