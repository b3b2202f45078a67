"""Rollouts in the model that trains, with Transformer Engine's layers and in FP8."""

import numpy as np
import pytest
import torch

from ra3_megatron.data.batch import collate
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_health import delayed_states
from ra3_megatron.model.precision import fp8_modules
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import score_labels
from tests.fake_te.conftest import ARCH, SEQ, batch, engine

ROWS, DRAWN = 5, 20


def sample(rollouts, version=None):
    """Texts of five rows of 1 to 9 tokens and 20 drawn ones, log-probs [rows, 20]."""
    if version is not None:
        rollouts.weights_version = version
    chance, every = np.random.default_rng(0), rollouts.token_set(np.arange(ARCH.vocab_size))
    texts = [chance.integers(ARCH.vocab_size, size=n).tolist() for n in (1, 9, 4, 6, 3)]
    rows, found = [rollouts.open(t) for t in texts], np.zeros((ROWS, DRAWN))
    for step in range(DRAWN):
        queries = [Query(0, every, float(u)) for u in chance.random(ROWS)]
        answers = rollouts.step([Extend(r, (), (q,), append=True) for r, q in zip(rows, queries, strict=True)])
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            text.append(int(answer.drawn[0]))
            found[i, step] = answer.drawn_log_probs[0]
    for row in rows:
        rollouts.close(row)
    return texts, found


def scored(chunks, parallel, texts):
    """The drawn tokens' log-probs by the trainer's pass over packed windows."""
    found = []
    for text in texts:
        ids = np.array(text, dtype=np.int32)
        window = collate([[TrainSequence(ids, {"all": np.ones(len(ids), np.float32)})]], SEQ, 0, 1, ("all",))
        (scores,) = score_labels(chunks, ARCH, parallel, [window])
        found.append(scores[len(ids) - 1 - DRAWN : len(ids) - 1].numpy())
    return np.array(found)


@pytest.mark.parametrize(
    ("model", "most"),
    [
        ({"precision": "fp32"}, 1e-4),
        ({"precision": "bf16"}, 0.1),
        ({"precision": "fp8", "fp8_recipe": "tensorwise"}, 0.5),
        ({"precision": "fp8", "fp8_recipe": "tensorwise", "fp8_params": True}, 0.5),
        ({"precision": "fp8", "fp8_recipe": "blockwise", "bf16_layers_at_start": 1}, 0.5),
        ({"precision": "fp8", "fp8_recipe": "delayed"}, 0.5),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_log_probs_are_the_trainers(parallel, model, most):
    """The cache's place in the layers under other names, positions of fused rotation, a pass outside of FP8's context,
    a number of tokens that FP8 cannot multiply."""
    e = engine(parallel, **model)
    for step in (1, 2, 3):
        e.train_step([batch(1), batch(2)], step)
    rollouts = MegatronEngine(e.chunks, ARCH, parallel, ROWS, SEQ)
    tokens: list[int] = []
    hooks = [m.register_forward_pre_hook(lambda _, x: tokens.append(len(x[0]))) for _, m in fp8_modules(e.chunks)]
    texts, found = sample(rollouts)
    for hook in hooks:
        hook.remove()
    gap = np.abs(found - scored(e.chunks, parallel, texts))
    assert gap.max() < most
    assert rollouts.counters.decode_passes == DRAWN - 1
    if model["precision"] == "fp8":
        assert gap.max() > 0, "the same to the last bit: was it FP8?"
        assert {n % 16 for n in tokens} == {0}
        quantised = [m for _, m in fp8_modules(e.chunks) if m.fp8_initialized]
        assert len(quantised) == (12 if "bf16_layers_at_start" in model else 16)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_rollouts_follow_an_update(parallel, recipe):
    """Quantised weights of before the update: the layers keep them until somebody says that there are new ones."""
    e = engine(parallel, precision="fp8", fp8_recipe=recipe)
    e.train_step([batch(1), batch(2)], 1)
    rollouts = MegatronEngine(e.chunks, ARCH, parallel, ROWS, SEQ)
    first = sample(rollouts)
    quantised = [m._fp8_workspaces["weight"] for _, m in fp8_modules(e.chunks)]
    again = sample(rollouts)
    assert all(m._fp8_workspaces["weight"] is w for w, (_, m) in zip(quantised, fp8_modules(e.chunks), strict=True))
    np.testing.assert_array_equal(again[1], first[1])
    e.train_step([batch(1), batch(2)], 2)
    second = sample(rollouts, 1)
    assert not np.array_equal(second[1], first[1])
    for _, module in fp8_modules(e.chunks):
        module._fp8_workspaces.clear()
    np.testing.assert_array_equal(sample(MegatronEngine(e.chunks, ARCH, parallel, ROWS, SEQ))[1], second[1])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_training_does_not_know_of_rollouts(parallel, recipe):
    """Rollouts, scores and validation between two steps left their largest values in the next scales."""
    losses = []
    for between in (False, True):
        e = engine(parallel, precision="fp8", fp8_recipe=recipe)
        rollouts = MegatronEngine(e.chunks, ARCH, parallel, ROWS, SEQ)
        found = []
        for step in (1, 2, 3, 4):
            if between:
                with torch.no_grad():
                    unwrap(e.chunks[0]).embedding.word_embeddings.weight.mul_(4.0)  # larger than what is trained on
                before = [t.clone() for t in delayed_states(e.chunks)]
                texts, _ = sample(rollouts, step)
                scored(e.chunks, parallel, texts)
                e.evaluate([batch(3), batch(4)])
                for tensor, kept in zip(delayed_states(e.chunks), before, strict=bool(before)):
                    assert torch.equal(tensor, kept)
                with torch.no_grad():
                    unwrap(e.chunks[0]).embedding.word_embeddings.weight.div_(4.0)
            found.append(e.train_step([batch(1), batch(2)], step).loss)
        losses.append(found)
    assert losses[0] == losses[1]
