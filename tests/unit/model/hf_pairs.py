"""Tiny random Hugging Face models and an own loop that copies their weights into a GPTModel."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ra3_megatron.config.architecture import Architecture, RopeScaling

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_hidden_size": 80,
    "vocab_size": 131, "max_positions": 512,
}  # fmt: skip

ARCHITECTURES = {
    "llama3": Architecture(
        family="llama", tied_embeddings=False, qkv_bias=False, norm_eps=1e-5, rope_base=10000.0,
        rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=8.0, original_max_position=64),
        **(SHAPE | {"num_layers": 4}),
    ),
    "qwen2": Architecture(family="qwen2", tied_embeddings=True, qkv_bias=True, **SHAPE),
    "qwen3": Architecture(family="qwen3", tied_embeddings=False, qkv_bias=False, qk_norm=True, **SHAPE),
    "qwen3_moe": Architecture(
        family="qwen3_moe", tied_embeddings=False, qkv_bias=False, qk_norm=True, num_experts=8, experts_per_token=3,
        expert_ffn_hidden_size=24, norm_topk_prob=True, **SHAPE,
    ),
}  # fmt: skip


def random_hf(arch: Architecture, seed: int = 0) -> Any:
    """A Hugging Face model of this shape; every weight random, norms and biases included, fp32."""
    config = arch.to_hf()
    hf_config = AutoConfig.for_model(config.pop("model_type"), **config)
    hf_config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.mul_(3.0)
    return model


def _fused_qkv(arch: Architecture, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Megatron's order: per key/value head its query heads, its key, its value."""
    groups = arch.num_heads // arch.num_kv_heads
    split = (q.view(arch.num_kv_heads, groups * arch.head_dim, -1), *(t.view(arch.num_kv_heads, arch.head_dim, -1) for t in (k, v)))  # fmt: skip # noqa: E501
    return torch.cat(split, dim=1).reshape(-1, q.shape[-1] if q.dim() == 2 else 1)


def megatron_weights(arch: Architecture, hf: Any, padded_vocab: int) -> dict[str, torch.Tensor]:
    """Full (unsharded) weights of a GPTModel by its parameter names."""
    source = dict(hf.state_dict())
    pad = (0, 0, 0, padded_vocab - arch.vocab_size)
    embedding = torch.nn.functional.pad(source["model.embed_tokens.weight"], pad)
    out = {"embedding.word_embeddings.weight": embedding, "decoder.final_layernorm.weight": source["model.norm.weight"]}
    if not arch.tied_embeddings:
        out["output_layer.weight"] = torch.nn.functional.pad(source["lm_head.weight"], pad)
    for i in range(arch.num_layers):
        a, b = f"model.layers.{i}.", f"decoder.layers.{i}."
        qkv = [source[f"{a}self_attn.{x}_proj.weight"] for x in "qkv"]
        out[f"{b}self_attention.linear_qkv.weight"] = _fused_qkv(arch, *qkv)
        if arch.qkv_bias:
            biases = [source[f"{a}self_attn.{x}_proj.bias"] for x in "qkv"]
            out[f"{b}self_attention.linear_qkv.bias"] = _fused_qkv(arch, *biases).flatten()
        if arch.qk_norm:
            out[f"{b}self_attention.q_layernorm.weight"] = source[f"{a}self_attn.q_norm.weight"]
            out[f"{b}self_attention.k_layernorm.weight"] = source[f"{a}self_attn.k_norm.weight"]
        out[f"{b}self_attention.linear_qkv.layer_norm_weight"] = source[f"{a}input_layernorm.weight"]
        out[f"{b}self_attention.linear_proj.weight"] = source[f"{a}self_attn.o_proj.weight"]
        if arch.num_experts:
            out[f"{b}pre_mlp_layernorm.weight"] = source[f"{a}post_attention_layernorm.weight"]
            out[f"{b}mlp.router.weight"] = source[f"{a}mlp.gate.weight"]
            for e in range(arch.num_experts):
                expert = f"{b}mlp.experts.local_experts.{e}."
                out[f"{expert}linear_fc1.weight"] = source[f"{a}mlp.experts.gate_up_proj"][e]
                out[f"{expert}linear_fc2.weight"] = source[f"{a}mlp.experts.down_proj"][e]
            continue
        out[f"{b}mlp.linear_fc1.layer_norm_weight"] = source[f"{a}post_attention_layernorm.weight"]
        gate, up = source[f"{a}mlp.gate_proj.weight"], source[f"{a}mlp.up_proj.weight"]
        out[f"{b}mlp.linear_fc1.weight"] = torch.cat((gate, up))
        out[f"{b}mlp.linear_fc2.weight"] = source[f"{a}mlp.down_proj.weight"]
    return out


def _shard(name: str, full: torch.Tensor, weight: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    if full.shape == weight.shape:
        return full
    if "linear_fc1.weight" in name:
        return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])
    if "linear_proj" in name or "linear_fc2" in name:
        return full.chunk(tp, dim=1)[rank]
    return full.chunk(tp)[rank]


def load(chunks: list[Any], weights: dict[str, torch.Tensor], parallel: Any) -> None:
    """Copy this rank's share of `weights` into its model chunks; every parameter must be found."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            name = name.removeprefix("module.")
            if name.startswith("decoder.layers."):
                local, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
            source = name
            if name == "output_layer.weight" and name not in weights:
                source = "embedding.word_embeddings.weight"
            share = _shard(name, weights[source], weight, parallel.sizes.tensor, parallel.tensor_rank)
            with torch.no_grad():
                weight.copy_(share)
