"""Tensor- and pipeline-parallel completions must give the ids that one process gives for the same random numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ra3_megatron.algo.logprobs import VocabShard
from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.completion import CompletionSettings, Prompt, complete
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.sampling import LocalSet, answer_queries
from tests.distributed.launch import run_ranks
from tests.unit.rollout.test_completion import tokenizer

# Five rows of the embedding that the tokenizer has no id for.
ARCH = Architecture("qwen2", 4, 48, 4, 2, 12, 96, 305, True, True, rope_base=1e4, max_positions=256)
LAYOUTS = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2-sp", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
]
SETTINGS = {
    "greedy": CompletionSettings(24, 0.0, stop_ids=(7, 200)),
    "sampled": CompletionSettings(24, 0.8, stop=("e", "th"), stop_ids=(7, 200)),
    "top_p": CompletionSettings(24, 1.2, 0.7, stop_ids=(7, 200)),
}


def worker(layouts: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """On every rank: what each layout completes."""
    return [run_one(dict(layout), Path(folder)) for layout in layouts]


def run_one(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = layout.pop("name")
    config = config_from_dict(
        {
            "parallel": {**layout, "timeout_s": 60},
            "model": {"vocab_multiple": 8, "init_std": 0.2},
            "train": {"steps": 1},
        }
    )
    with initialize(config.parallel) as parallel:
        seed_everything(1, parallel)
        chunks = build_model(ARCH, config.model, parallel)
        state = {f"chunk{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}
        if name == "one":
            save_sharded(folder / "start", state, parallel)
        else:
            for i, values in enumerate(load_sharded(folder / "start", state, parallel).values()):
                chunks[i].load_state_dict(values)
        engine = MegatronEngine(chunks, ARCH, parallel, max_batch=5, max_tokens=64, tokens_per_forward=29)
        out: dict[str, Any] = {}
        for key, settings in SETTINGS.items():
            announced: list[Any] = []
            found = complete(engine, prompts(), settings, tokenizer(), 3, announced.append)
            out[key] = {
                "ids": [c.ids.tolist() for c in found],
                "ends": [[c.finish, c.text_bytes] for c in found],
                "order": [[c.prompt.number, c.prompt.member] for c in announced],
                "log_probs": np.concatenate([c.log_probs for c in found]).tolist(),
            }
        if name == "tp2":
            out["draws"] = draws(VocabShard(20 * parallel.tensor_rank, 37, parallel.pg_collection.tp), 20)
        if name == "one":
            out["draws"] = draws(VocabShard(0, 37), 40)
        return out


def prompts() -> list[Prompt]:
    chance = np.random.default_rng(0)
    ids = [chance.integers(tokenizer().vocab_size, size=n).astype(np.int32) for n in (1, 30, 9, 17)]
    return [Prompt(x, i, member) for i, x in enumerate(ids) for member in range(3)]


def draws(shard: VocabShard, width: int) -> list[list[float]]:
    """Rows with many equal logits, across the border of the shards too, asked in every way at once."""
    chance = np.random.default_rng(1)
    whole = torch.from_numpy(chance.integers(-2, 3, size=(60, 40)).astype(np.float32))
    device = torch.device("cpu")
    sets = [
        LocalSet.of(np.array(ids), shard, width, device)
        for ids in (range(37), range(3, 37), [1, 19, 20, 36], range(25), [30])
    ]
    numbers, top_p = torch.arange(60) % 5, torch.tensor([0.0, 0.3, 0.9, 1.0])[torch.arange(60) % 4].double()
    uniforms = torch.from_numpy(chance.random(60))
    mine = whole[:, shard.start : shard.start + width].clone()
    found = answer_queries(mine, sets, numbers, uniforms, shard, 0.9, top_p)
    return [found.ids.tolist(), found.log_probs.tolist(), found.log_masses.tolist()]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("completion")
    found: dict[str, list[dict[str, Any]]] = {}
    for world, layouts in ((1, [{"name": "one"}]), (2, LAYOUTS)):
        args = {"layouts": layouts, "folder": str(folder)}
        ranks = run_ranks("tests.distributed.test_completion:worker", world, args, 180, folder)
        for layout, *values in zip(layouts, *ranks, strict=True):
            found[layout["name"]] = values
    return found


@pytest.mark.parametrize("how", sorted(SETTINGS))
def test_completions_are_the_same_in_every_layout(results, how):
    """The most probable id of one half of the vocabulary, a rank that ends a row the others go on with."""
    (one,) = results["one"]
    assert len(one[how]["ids"]) == 12
    assert len({e[0] for e in one[how]["ends"]}) > 1 or how != "sampled"
    for layout in LAYOUTS:
        for rank in results[layout["name"]]:
            for what in ("ids", "ends", "order"):
                assert rank[how][what] == one[how][what], (layout, what)
            np.testing.assert_allclose(rank[how]["log_probs"], one[how]["log_probs"], rtol=0, atol=2e-5)


def test_equal_logits_over_the_border_of_the_vocabulary(results):
    """Of equally probable ids on two processes the higher one, or one of each, was taken."""
    (one,) = results["one"]
    for rank in results["tp2"]:
        assert rank["draws"][0] == one["draws"][0]
        for number in (1, 2):
            np.testing.assert_allclose(rank["draws"][number], one["draws"][number], rtol=0, atol=1e-6)
