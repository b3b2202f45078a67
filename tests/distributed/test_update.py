"""Scores of lines, and the engine's log-probabilities of a rollout's actions, in every layout that rollouts run in."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.checkpoint.distributed import load_sharded, save_sharded
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.sections import TrainConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import LineScorer
from ra3_megatron.rollout.update import update_batches, update_sequences
from ra3_megatron.training.actions import ActionTable
from ra3_megatron.training.components import decision_kl_component, policy_gradient_component
from ra3_megatron.training.engine import TrainEngine
from tests.distributed.launch import run_ranks
from tests.unit.rollout.naive import OftenThinks, texts_and_tokens

# Three embedding rows more than the tokenizer has ids: they have probability and are never drawn.
ARCH = Architecture("qwen2", 4, 48, 4, 2, 12, 96, 323, True, True, rope_base=1e4, max_positions=256)
SEQ = 256
LAYOUTS = [
    {"name": "dp2"},  # the reference: every rank has the whole model
    {"name": "tp2", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "vpp2", "pipeline": 2, "virtual_pipeline": 2},
    {"name": "cp2", "context": 2},
]
texts = cache(texts_and_tokens)


def worker(layouts: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """On every rank: what each layout finds."""
    return [run_one(dict(layout), Path(folder)) for layout in layouts]


def run_one(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    name = layout.pop("name")
    config = config_from_dict(
        {
            "parallel": {**layout, "timeout_s": 60},
            "model": {"vocab_multiple": 8, "init_std": 0.2},
            "train": {"steps": 1, "seq_length": SEQ, "micro_batch_size": 1, "global_batch_size": 4},
        }
    )
    with initialize(config.parallel) as parallel:
        seed_everything(1, parallel)
        chunks = build_model(ARCH, config.model, parallel)
        state = {f"chunk{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(chunks)}
        if name == "dp2":
            save_sharded(folder / "start", state, parallel)
        else:
            for i, values in enumerate(load_sharded(folder / "start", state, parallel).values()):
                chunks[i].load_state_dict(values)
        trajectories, think_tokens = texts()
        scorer = LineScorer(chunks, ARCH, parallel, config, think_tokens)
        # Replicas score lists of different length, the second none at all at first.
        mine = [] if name == "dp2" and parallel.rank == 1 else trajectories
        out = {"bare": [s.lines.tolist() for s in scorer.score(mine)]}
        if parallel.sizes.context > 1:
            return out
        return out | {str(t): updated(config, chunks, parallel, scorer, t) for t in (1.0, 0.7)}


def updated(config: Any, chunks: Any, parallel: Parallel, scorer: LineScorer, temperature: float) -> dict[str, Any]:
    """Rollouts, their lines scored again, and what the training engine says about their actions."""
    trajectories, think_tokens = texts()
    engine = MegatronEngine(chunks, ARCH, parallel, max_batch=8, max_tokens=SEQ)
    found = rollout(engine, trajectories, 2, OftenThinks(2), RolloutSettings(temperature, 5), think_tokens)
    scores = scorer.score([r.trajectory for r in found])
    gains = scorer.without_thought([r.trajectory for r in found])
    table = ActionTable.of(think_tokens, ARCH.vocab_size, temperature)
    components = [policy_gradient_component(PolicyLossConfig()), decision_kl_component(0.9)]
    trainer = TrainEngine(config, ARCH, parallel, chunks, components, 1, table)
    share = found[parallel.data_rank :: parallel.sizes.data]
    result = trainer.evaluate(batches(share, config.train, parallel))
    return {
        "thoughts": sum(int(r.thought.sum()) for r in found),
        "actions": sum(len(r.positions) for r in found),
        "counted": result.weights["policy_gradient"],
        "gap": result.monitors["rollout_gap"],
        "components": result.components,
        "lines": max(float(np.abs(s.lines - r.line_log_probs).max()) for s, r in zip(scores, found, strict=True)),
        "without": max(difference(g, r.without_thought) for g, r in zip(gains, found, strict=True)),
    }


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference where there are numbers; infinite where only one has them."""
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0.0)) if not np.isnan(a).all() else 0.0


def batches(rollouts: list[Rollout], train: TrainConfig, parallel: Parallel) -> list[TrainBatch]:
    """The rollouts' actions, with advantages that differ by line and member."""
    _, think_tokens = texts()
    advantages = [np.linspace(-1.0, 1.0, r.trajectory.num_lines) + r.member for r in rollouts]
    sequences = update_sequences(rollouts, advantages, think_tokens)
    return update_batches(sequences, train, parallel)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("update")
    args = {"layouts": LAYOUTS, "folder": str(folder)}
    ranks = run_ranks("tests.distributed.test_update:worker", 2, args, 240, folder)
    return {layout["name"]: list(values) for layout, *values in zip(LAYOUTS, *ranks, strict=True)}


def test_lines_score_alike_in_every_layout(results):
    """A stage that never gets the answer, rows of another shard, a replica that waits for one with nothing to do."""
    one = results["dp2"][0]
    expected = np.concatenate(one["bare"])
    assert (expected < -1).all()
    for name, ranks in results.items():
        for number, rank in enumerate(ranks):
            if name == "dp2" and number == 1:
                assert rank["bare"] == []
                continue
            np.testing.assert_allclose(np.concatenate(rank["bare"]), expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("temperature", ["1.0", "0.7"])
def test_actions_have_the_log_probs_they_were_drawn_with(results, temperature):
    """Behaviour and current log-probs that differ at equal weights: off by a row, another temperature, unmasked ids."""
    one = results["dp2"][0]
    for name in set(results) - {"cp2"}:
        for rank in results[name]:
            found = rank[temperature]
            assert found["thoughts"] > 5
            assert found["actions"] == found["counted"] > 30
            assert found["gap"] <= 1e-5, name
            assert found["lines"] <= 2e-5, name
            # A rollout knows the decision at its own temperature, the scorer at 1.
            assert temperature != "1.0" or found["without"] <= 2e-5, name
            assert found["components"] == pytest.approx(one[temperature]["components"], rel=1e-5), name
