"""Speed of import and export against a plain safetensors copy of the same bytes, in the same run.

    python benchmarks/convert.py [--gb 0.5] [--dtype bfloat16] [--repeat 3] [--experts 128]

Prints seconds per 10^9 bytes (best of the repeats, files in the page cache, synced to disk at the end of each step)
and the ratio to the copy. The copy reads every tensor with safetensors and writes it back with safetensors: the floor
of any conversion. Import also interleaves, checks for NaN and hashes; export de-interleaves, shards and hashes.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ra3_megatron.checkpoint.convert import export_hf, import_hf
from ra3_megatron.checkpoint.hf_io import dtype_named
from ra3_megatron.checkpoint.hf_mapping import hf_shapes
from ra3_megatron.config.architecture import Architecture

TARGET = 3.0
"""Largest ratio to the copy that counts as good."""


def model_of(size_gb: float, dtype: torch.dtype, experts: int) -> Architecture:
    """A Llama-like shape, or Qwen3-30B-A3B's with `experts`, whose weights take at least `size_gb` * 10^9 bytes."""
    layers = 1
    while True:
        arch = Architecture(
            family="llama", num_layers=layers, hidden_size=1536, num_heads=12, num_kv_heads=4, head_dim=128,
            ffn_hidden_size=4096, vocab_size=32000, tied_embeddings=True, qkv_bias=False,
        )  # fmt: skip
        if experts:
            arch = Architecture(
                family="qwen3_moe", num_layers=layers, hidden_size=2048, num_heads=32, num_kv_heads=4, head_dim=128,
                vocab_size=32000, tied_embeddings=False, qkv_bias=False, qk_norm=True, num_experts=experts,
                experts_per_token=min(8, experts), expert_ffn_hidden_size=768,
            )  # fmt: skip
        if arch.parameter_count * dtype.itemsize >= size_gb * 1e9:
            return arch
        layers += 1


def write_model(folder: Path, arch: Architecture, dtype: torch.dtype) -> None:
    """A Hugging Face folder with random weights of `arch`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(arch.to_hf()))
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in hf_shapes(arch).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def plain_copy(source: Path, target: Path) -> None:
    """Read every tensor and write it back; synced like ours."""
    target.mkdir()
    with safe_open(source / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - safe_open is no mapping
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    fd = os.open(target / "model.safetensors", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def best(step: Callable[[], object], target: Path, repeat: int) -> float:
    """Fewest seconds of `repeat` runs of `step`, which writes the folder `target`."""
    times = []
    for _ in range(repeat):
        shutil.rmtree(target, ignore_errors=True)
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Run the three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=0.5, help="size of the weights, 10^9 bytes")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each step; the best counts")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: the system's temporary)")
    parser.add_argument("--experts", type=int, default=0, help="experts of a layer; 0 = dense")
    options = parser.parse_args()
    dtype = dtype_named(options.dtype)
    arch = model_of(options.gb, dtype, options.experts)
    size = arch.parameter_count * dtype.itemsize / 1e9
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        write_model(root / "hf", arch, dtype)
        copy, ckpt, out = root / "copy", root / "ckpt", root / "out"
        steps: dict[str, tuple[Callable[[], object], Path]] = {
            "safetensors copy": (lambda: plain_copy(root / "hf", copy), copy),
            "import": (lambda: import_hf(root / "hf", ckpt), ckpt),
            "export": (lambda: export_hf(ckpt, out), out),
        }
        seconds = {step: best(run, target, options.repeat) for step, (run, target) in steps.items()}
    floor = seconds["safetensors copy"]
    kind = f" x {options.experts} experts" if options.experts else ""
    print(f"{size:.2f} GB {options.dtype}, {arch.num_layers} layers{kind}, best of {options.repeat}")
    for step, taken in seconds.items():
        verdict = "" if step == "safetensors copy" else f"{taken / floor:5.2f} x copy (target {TARGET:g})"
        print(f"{step:18} {taken / size:6.2f} s/GB  {verdict}")


if __name__ == "__main__":
    main()
