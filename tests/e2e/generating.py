"""Rationale generation by itself, on a few real files with a model of random weights that thinks now and then."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.config.sections import CheckpointConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.data.prepare import open_prepared, prepare, prepare_tokenizer
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.generate import GenerateInputs, run_generate
from ra3_megatron.stages.run_folder import RunFolder
from tests.e2e import small

SNIPPET = 116
"""Tokens of a snippet; rows have 127: thoughts have room in most, not in all."""


def make_config(folder: Path, **changes: dict[str, Any]) -> RunConfig:
    """`small.config` on five of its files."""
    sections: dict[str, Any] = {
        "run": {"dir": str(folder / "run" / "named")},
        "latent": {"max_latent_tokens": 6, "max_batch": 16},
        "generate": {"shard_snippets": 12},
    }
    for name, values in changes.items():
        sections.setdefault(name, {}).update(values)
    plain = small.config(folder, **sections)
    plain["data"]["corpus"]["limit"] = 5
    plain["data"]["validation_fraction"] = 0.3
    return config_from_dict(plain)


def architecture(config: RunConfig) -> Architecture:
    assert config.model.architecture is not None
    return dataclasses.replace(config.model.architecture, num_layers=2)


def write_start(folder: Path, parallel: Parallel) -> None:
    """`folder/corpus`, and `folder/weights/step_...`: random weights with decided opinions."""
    config = make_config(folder)
    tokenizer = prepare_tokenizer(config.data, folder / "tokenizer")
    corpus = prepare(config.data, tokenizer, SNIPPET, folder / "corpus")
    seed_everything(0, parallel)
    chunks = build_model(architecture(config), dataclasses.replace(config.model, init_std=0.3), parallel)
    thinks = [corpus.think_tokens[i].ids for i in range(len(corpus.think_tokens))]
    with torch.no_grad():
        # A long row makes for logits that are large, in about half of all contexts positive: a thought.
        unwrap(chunks[0]).embedding.word_embeddings.weight[np.unique(np.concatenate(thinks))] *= 4.0
    settings = CheckpointConfig(async_save=False)
    store = CheckpointStore(folder / "weights", settings, parallel, architecture=architecture(config))
    event = store.save(0, chunks, None, None, TrainState("start"))
    assert event is not None
    assert event.ok, event.message


def weights(folder: Path) -> Path:
    (found,) = [path.parent for path in (folder / "weights").glob("*/DONE")]
    return found


def generate(folder: str, run: str, samples: int = 1, **changes: dict[str, Any]) -> dict[str, Any]:
    """The stage on this rank, into `run`; what it returns."""
    start = Path(folder)
    config = make_config(start, run={"dir": run}, **changes)
    with initialize(config.parallel) as parallel:
        layout = resolve_layout(config, parallel.world_size, architecture(config))
        context = Context(config, architecture(config), layout, parallel, RunFolder(Path(run)))
        inputs = GenerateInputs(open_prepared(start / "corpus"), weights(start), 1, samples, samples > 1)
        return run_generate(context, context.folder.stage(4, "ra3-generate-1"), inputs)
