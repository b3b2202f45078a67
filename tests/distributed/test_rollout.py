"""Tensor- and pipeline-parallel rollouts must give what one process gives for the same random numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.distributed.launch import run_ranks
from tests.unit.rollout.naive import OftenThinks, texts_and_tokens

ARCH = Architecture("qwen2", 4, 48, 4, 2, 12, 96, 323, True, True, rope_base=1e4, max_positions=256)
EXPERTS = Architecture(
    "qwen3_moe", 4, 48, 4, 2, 12, 96, 323, False, False, True, max_positions=256,
    num_experts=4, experts_per_token=2, expert_ffn_hidden_size=40, norm_topk_prob=True,
)  # fmt: skip
ONE = [{"name": "one"}, {"name": "experts-one"}]
TWO = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2-sp", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "vpp2", "pipeline": 2, "virtual_pipeline": 2},
    {"name": "cp2", "context": 2},
    {"name": "experts-dp2", "expert": 2},
    {"name": "experts-tp2", "tensor": 2, "sequence": True},
    {"name": "experts-ep2", "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1},
]
FOUR = [{"name": "tp2-pp2", "tensor": 2, "pipeline": 2, "sequence": True}]
ALIKE = {
    "one": ("tp2", "tp2-sp", "pp2", "vpp2", "tp2-pp2"),
    "experts-one": ("experts-tp2", "experts-ep2"),
}
"""One process, and the layouts that must answer the same."""


def worker(layouts: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """On every rank: what each layout answers."""
    return [run_one(dict(layout), Path(folder)) for layout in layouts]


def run_one(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = layout.pop("name")
    arch, start = (EXPERTS, "start-experts") if name.startswith("experts") else (ARCH, "start")
    config = config_from_dict(
        {
            "parallel": {**layout, "timeout_s": 60},
            "model": {"vocab_multiple": 8, "init_std": 0.2},
            "train": {"steps": 1},
        }
    )
    with initialize(config.parallel) as parallel:
        seed_everything(1, parallel)
        chunks = build_model(arch, config.model, parallel)
        state = {f"chunk{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}
        if name in ALIKE:
            save_sharded(folder / start, state, parallel)
        else:
            for i, values in enumerate(load_sharded(folder / start, state, parallel).values()):
                chunks[i].load_state_dict(values)
        try:
            engine = MegatronEngine(chunks, arch, parallel, max_batch=3, max_tokens=128, tokens_per_forward=29)
        except UserError as error:
            return {"refused": str(error)}
        return engine_answers(engine) | rollout_answers(engine)


def engine_answers(engine: MegatronEngine) -> dict[str, Any]:
    """A mix of forced and sampled tokens, rollbacks and reused rows."""
    generator = np.random.default_rng(0)
    few, most = engine.token_set([3, 40, 190, 320]), engine.token_set(np.arange(2, 321))
    rows = [engine.open(generator.integers(ARCH.vocab_size, size=n).tolist()) for n in (1, 12, 5)]
    out: dict[str, list[Any]] = {"scores": [], "masses": [], "drawn": []}
    for turn in range(6):
        extends = []
        for row in rows:
            new = generator.integers(ARCH.vocab_size, size=int(generator.integers(0, 8))).tolist()
            middle = [Query(int(generator.integers(0, len(new) + 1)), few, generator.random())]
            extends.append(Extend(row, new, [*middle, Query(len(new), most, generator.random())], append=True))
        for answer in engine.step(extends, temperature=0.8):
            out["scores"] += answer.log_probs.tolist()
            out["masses"] += [*answer.log_masses.tolist(), *answer.drawn_log_probs.tolist()]
            out["drawn"] += answer.drawn.tolist()
        engine.rollback(rows[turn % 3], max(1, engine.length(rows[turn % 3]) - 4))
        if turn == 3:
            engine.close(rows[1])
            rows[1] = engine.open([5, 6, 7])
    return out | {"counters": dataclasses.asdict(engine.counters)}


def rollout_answers(engine: MegatronEngine) -> dict[str, Any]:
    """Interleaved rollouts of three snippets."""
    for row in list(engine._rows):
        engine.close(row)
    trajectories, think_tokens = texts_and_tokens()
    settings = RolloutSettings(temperature=0.9, max_latent_tokens=5, chunk_tokens=16)
    found = rollout(engine, trajectories[1:], 2, OftenThinks(2), settings, think_tokens)
    return {
        "rollouts": [r.trajectory.ids.tolist() for r in found],
        "thoughts": sum(int(r.thought.sum()) for r in found),
        "values": np.concatenate([np.r_[r.p_think, r.log_probs, r.line_log_probs] for r in found]).tolist(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("rollout")
    found: dict[str, list[dict[str, Any]]] = {}
    for world, layouts in ((1, ONE), (2, TWO), (4, FOUR)):
        args = {"layouts": layouts, "folder": str(folder)}
        ranks = run_ranks("tests.distributed.test_rollout:worker", world, args, 240, folder)
        for layout, *values in zip(layouts, *ranks, strict=True):
            found[layout["name"]] = values
    return found


def test_engine_is_the_same_in_every_layout(results):
    """Draws that depend on the split of the vocabulary, answers that reach one stage only, a rank that disagrees."""
    for alone, others in ALIKE.items():
        (one,) = results[alone]
        assert len(set(one["drawn"])) > 10
        for name, rank in [(other, rank) for other in others for rank in results[other]]:
            assert rank["drawn"] == one["drawn"], name
            assert rank["counters"] == one["counters"], name
            np.testing.assert_allclose(rank["scores"], one["scores"], rtol=0, atol=2e-5, err_msg=name)
            np.testing.assert_allclose(rank["masses"], one["masses"], rtol=0, atol=2e-5, err_msg=name)


def test_rollouts_are_the_same_in_every_layout(results):
    """Same for whole rollouts, where one wrong draw changes everything after it."""
    for alone, others in ALIKE.items():
        (one,) = results[alone]
        assert one["thoughts"] > 2
        for name, rank in [(other, rank) for other in others for rank in results[other]]:
            assert rank["rollouts"] == one["rollouts"], name
            np.testing.assert_allclose(rank["values"], one["values"], rtol=0, atol=2e-4, err_msg=name)


def test_context_parallelism_is_refused(results):
    """A cache that is not split along the sequence would attend to a part of the text only."""
    for rank in results["cp2"]:
        assert "context" in rank["refused"]


def test_experts_shared_by_replicas_are_refused(results):
    """Replicas sample at their own pace: the one that needs fewer passes would leave the other waiting for ever."""
    for rank in results["experts-dp2"]:
        assert "reaches over replicas of tensor 1" in rank["refused"]
