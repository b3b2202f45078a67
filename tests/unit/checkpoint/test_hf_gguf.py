"""GGUF files: a synthetic Llama 3 with every trap in it, and the real SmolLM2-135M."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ra3_megatron.checkpoint.convert import export_hf, import_hf, source_architecture
from ra3_megatron.checkpoint.hf_gguf import GGUFFile
from ra3_megatron.checkpoint.verify import verify
from ra3_megatron.config.architecture import Architecture, RopeScaling
from ra3_megatron.config.errors import UserError
from tests.unit.model.hf_pairs import random_hf
from tests.unit.smollm2 import MISSING, smollm2_path

ARCH = Architecture(
    family="llama", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_hidden_size=96,
    vocab_size=260, tied_embeddings=False, qkv_bias=False, rope_base=500000.0, norm_eps=1e-5, max_positions=4096,
    rope_scaling=RopeScaling(factor=8.0),
)  # fmt: skip

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    for hf, ours in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        if name == f"{hf}.weight":
            return f"{ours}.weight"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{match[1]}.{LAYER[match[2]]}.weight"


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama3_factors(factor: float, low: float = 1.0, high: float = 4.0, original: int = 8192) -> np.ndarray:
    """Rotary factors as llama.cpp's converter writes them, frequency by frequency."""
    factors = []
    for i in range(0, 16, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 16)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def byte_tokens() -> list[str]:
    """The 256 byte symbols of GPT-2's tokenizer, then two merges and two special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*bytes_to_unicode().values(), "ab", "abc", "<s>", "</s>"]


def write_gguf(path: Path, *, family: str = "llama", factors: np.ndarray | None = None, extra: str | None = None):
    """Write the tiny model; returns the Hugging Face model with the same weights."""
    model = random_hf(ARCH)
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_block_count(ARCH.num_layers)
    writer.add_context_length(ARCH.max_positions)
    writer.add_embedding_length(ARCH.hidden_size)
    writer.add_feed_forward_length(ARCH.ffn_hidden_size)
    writer.add_head_count(ARCH.num_heads)
    writer.add_head_count_kv(ARCH.num_kv_heads)
    writer.add_rope_freq_base(ARCH.rope_base)
    writer.add_layer_norm_rms_eps(ARCH.norm_eps)
    writer.add_rope_dimension_count(ARCH.head_dim)
    writer.add_vocab_size(ARCH.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(byte_tokens())
    writer.add_token_types([1] * 258 + [3, 3])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_tensor("rope_freqs.weight", llama3_factors(8.0) if factors is None else factors)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = llama_cpp_order(values, ARCH.num_heads if "q_proj" in name else ARCH.num_kv_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    if extra:
        writer.add_tensor(extra, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_llama3_gguf_gives_the_models_logits(tmp_path):
    """Row order of q/k and Llama 3's scaling (stored as factors only) are lost by readers that copy names alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = write_gguf(tmp_path / "m.gguf")
    assert source_architecture(tmp_path / "m.gguf") == ARCH
    import_hf(tmp_path / "m.gguf", tmp_path / "ckpt")
    assert export_hf(tmp_path / "ckpt", tmp_path / "hf").tokenizer
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.randint(258, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("abc\tdé")["input_ids"][-1] != tokenizer.unk_token_id
    assert tokenizer.decode(tokenizer("abc\tdé 12", add_special_tokens=False)["input_ids"]) == "abc\tdé 12"
    assert tokenizer.eos_token_id == exported.config.eos_token_id == 259
    report = verify(tmp_path / "ckpt", tmp_path / "hf")
    assert report.ok, str(report)


def test_bad_files_are_refused(tmp_path):
    """Numpy clips a truncated memory map without a word; unknown tensors and scalings change the logits."""
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="does not exist"):
        GGUFFile(path)
    write_gguf(path)
    content = path.read_bytes()
    for size, message in ((len(content) - 1000, "truncated|not a complete"), (2000, "not a complete"), (2, "complete")):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=message):
            import_hf(path, tmp_path / "ckpt")
    path.write_bytes(b"no model at all, just text " * 100)
    with pytest.raises(UserError, match="not a complete GGUF file"):
        import_hf(path, tmp_path / "ckpt")
    write_gguf(path, factors=np.linspace(1, 3, 8, dtype=np.float32))
    with pytest.raises(UserError, match="is not Llama 3's scaling"):
        import_hf(path, tmp_path / "ckpt")
    write_gguf(path, extra="blk.0.attn_sinks.weight")
    with pytest.raises(UserError, match=r"1 extra \(blk.0.attn_sinks.weight\)"):
        import_hf(path, tmp_path / "ckpt")
    write_gguf(path, family="mamba")
    with pytest.raises(UserError, match="architecture 'mamba' cannot be imported"):
        import_hf(path, tmp_path / "ckpt")
    part = tmp_path / "m-00001-of-00002.gguf"
    part.write_bytes(content)
    with pytest.raises(UserError, match="split GGUF"):
        import_hf(part, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.slow
@pytest.mark.skipif(smollm2_path() is None, reason=MISSING)
def test_smollm2_equals_transformers_own_reading(tmp_path):
    """A real model: same logits as transformers' GGUF loader, bit-equal weights, and sane greedy text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate, which is not installed")
    source = smollm2_path()
    report = import_hf(source, tmp_path / "ckpt")
    assert report.architecture.parameter_count == 134_515_008
    result = verify(tmp_path / "ckpt", source)
    assert result.ok, str(result)
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=16, do_sample=False)[0])
    assert "Paris" in text
