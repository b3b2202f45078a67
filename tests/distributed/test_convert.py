"""One imported checkpoint loads into every layout with transformers' logits, and exports from what any layout wrote."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ra3_megatron.checkpoint.convert import export_hf, import_hf
from tests.distributed.convert_ranks import token_ids
from tests.distributed.launch import run_ranks
from tests.unit.model.hf_pairs import ARCHITECTURES, random_hf

LAYOUTS = {
    2: [
        ("llama3", {"tensor": 2}),
        ("qwen2", {"tensor": 2}),
        ("qwen3", {"tensor": 2, "sequence": True}),
        ("llama3", {"pipeline": 2}),
        ("qwen2", {"pipeline": 2}),
        ("llama3", {"pipeline": 2, "virtual_pipeline": 2}),
        ("qwen3_moe", {"expert": 2}),
        ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}),
    ],
    4: [
        ("llama3", {"tensor": 2, "pipeline": 2}),
        ("qwen2", {"tensor": 2, "pipeline": 2}),
        ("qwen3_moe", {"tensor": 2, "sequence": True, "expert": 2}),
        ("qwen3_moe", {"pipeline": 2, "expert": 2}),
    ],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Hugging Face folder, imported checkpoint and reference logits of each family."""
    root = tmp_path_factory.mktemp("sources")
    out = {}
    for family, arch in ARCHITECTURES.items():
        model = random_hf(arch)
        model.save_pretrained(root / family)
        import_hf(root / family, root / f"{family}-ckpt")
        with torch.no_grad():
            logits = model(token_ids(arch.vocab_size)).logits[0]
        out[family] = (root / family, root / f"{family}-ckpt", logits)
    return out


@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_every_layout_gives_the_reference(sources, tmp_path, world):
    """Shards must hold whole head groups, gate with up, and no padding rows (131 rows are odd: padded at every TP);
    layers must land in their stage, experts on their process; what a layout saves must export to the source's tensors
    bit for bit."""
    cases = [
        {
            "architecture": ARCHITECTURES[family].to_dict(),
            "parallel": sizes,
            "vocab_multiple": 3,
            "checkpoint": str(sources[family][1]),
            "logits": str(tmp_path / f"{i}.pt"),
            "save": str(tmp_path / f"{i}" / "dist"),
        }
        for i, (family, sizes) in enumerate(LAYOUTS[world])
    ]
    results = run_ranks("tests.distributed.convert_ranks:layouts", world, {"cases": cases}, 300, tmp_path)
    for i, (family, sizes) in enumerate(LAYOUTS[world]):
        where = f"{family} {sizes}"
        assert all(rank[i]["same_hash"] for rank in results), where
        rows = max(sum(rank[i]["rows"], 0) for rank in results)
        assert rows * sizes.get("tensor", 1) > ARCHITECTURES[family].vocab_size, where
        logits = torch.load(tmp_path / f"{i}.pt")
        assert (logits - sources[family][2]).abs().max() < 1e-5, where

        folder, checkpoint, _ = sources[family]
        written = tmp_path / str(i)
        for name in ("architecture.json", "DONE"):
            shutil.copy(checkpoint / name, written / name)
        shutil.copytree(checkpoint / "hf", written / "hf")
        export_hf(written, tmp_path / f"{i}-hf")
        before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / f"{i}-hf" / "model.safetensors")
        assert set(before) == set(after), where
        assert all(torch.equal(before[name], after[name]) for name in before), where
        config = json.loads((tmp_path / f"{i}-hf" / "config.json").read_text())
        assert config["vocab_size"] == ARCHITECTURES[family].vocab_size
