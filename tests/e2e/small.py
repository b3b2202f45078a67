"""A run that takes seconds: a few files of real code, a model of 60 thousand weights."""

import ast
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml

MODULES = ("argparse", "textwrap", "shlex", "heapq", "bisect", "csv", "fnmatch", "glob", "calendar", "sched", "string")


def write_corpus(folder: Path) -> Path:
    """Some modules of the standard library as a folder of source files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        source = Path(ast.__file__).with_name(f"{name}.py")
        shutil.copyfile(source, folder / source.name)
    return folder


def config(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration on `write_corpus(folder / "code")`; `changes` are merged section by section."""
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "seed": 7, "arms": ["ntp"]},
        "model": {
            "architecture": {
                "family": "qwen2", "num_layers": 4, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2,
                "head_dim": 8, "ffn_hidden_size": 64, "vocab_size": 517, "tied_embeddings": True, "qkv_bias": True,
                "max_positions": 512,
            },
            "vocab_multiple": 8,
        },
        "data": {
            "corpus": {"kind": "folder", "path": str(write_corpus(folder / "code"))},
            "tokenizer": {"kind": "train_bpe", "vocab_size": 512},
            "validation_fraction": 0.2,
            "workers": 1,
        },
        "train": {
            "seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8, "steps": 24, "eval_interval": 8,
            "eval_windows": 8,
        },
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "checkpoint": {"interval": 2},
        "report": {"interval": 8, "tensorboard": False},
        "parallel": {"timeout_s": 60.0, "threads": 1},
    }  # fmt: skip
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
    return base


def write_config(folder: Path, **changes: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(folder, **changes)))
    return path


def all_tensors(dist_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a distributed checkpoint, whole: weights, master weights, moments."""
    reader = dcp.FileSystemReader(dist_folder)
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in entries if hasattr(v, "size")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
