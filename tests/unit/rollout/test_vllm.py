"""What of the vLLM engine runs without vLLM: rows and answers on a model asked about whole texts, weights, refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ra3_megatron.checkpoint.hf_mapping import live_hf_tensors
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.factory import build_rollout_engine
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.vllm import QUERIES, PromptEngine
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import OftenThinks, texts_and_tokens
from tests.unit.rollout.test_interleaved import same


class WholeTexts:
    """The model's ordinary forward pass over each text."""

    def __init__(self, chunk, vocab_size):
        self.chunk, self.vocab_size, self.updates = chunk, vocab_size, 0

    def prompt_log_probs(self, texts):
        found = [full_log_probs(self.chunk, self.vocab_size, t)[:-1].numpy() for t in texts]
        return [f[np.arange(len(t) - 1), t[1:]] for f, t in zip(found, texts, strict=True)]

    def next_log_probs(self, texts):
        return torch.stack([full_log_probs(self.chunk, self.vocab_size, t)[-1] for t in texts]).float()

    def update(self):
        self.updates += 1


@pytest.fixture(scope="module")
def model(make_model):
    arch, (chunk,) = make_model("qwen2", texts_and_tokens()[1].tokenizer.vocab_size)
    return arch, chunk


def test_same_rollouts_as_megatron(model, parallel):
    """An answer for another row, a query at another place, a rollback that is forgotten."""
    arch, chunk = model
    trajectories, think_tokens = texts_and_tokens()
    options = RolloutSettings(0.8, 5, 30)
    arguments = (trajectories, 2, OftenThinks(4), options, think_tokens)
    engine = PromptEngine(WholeTexts(chunk, arch.vocab_size), arch.vocab_size, 5, 400, 0)
    found = rollout(engine, *arguments)
    assert sum(r.thought.sum() for r in found) > 5
    same(found, rollout(MegatronEngine([chunk], arch, parallel, 5, 400), *arguments))
    assert not engine._rows
    assert engine.counters.tokens > sum(len(r.trajectory.ids) for r in found)


def test_many_queries(model, parallel):
    """More queries than one batch holds, rows without ids and without queries in between."""
    arch, chunk = model
    uniforms = np.random.default_rng(0).random(QUERIES + 3)
    results = []
    for engine in (
        PromptEngine(WholeTexts(chunk, arch.vocab_size), arch.vocab_size, 3, 50, 0),
        MegatronEngine([chunk], arch, parallel, 3, 50),
    ):
        few = engine.token_set([3, 9, 40])
        rows = [engine.open([1, 2, 3]), engine.open([5]), engine.open([6, 7])]
        queries = [Query(i % 3, few, u) for i, u in enumerate(uniforms)]
        extends = [
            Extend(rows[0], [4, 5], queries),
            Extend(rows[1], [8, 9, 10]),
            Extend(rows[2], [], [Query(0, few, 0.5)], append=True),
        ]
        results.append(engine.step(extends))
        assert [engine.length(r) for r in rows] == [5, 4, 3]
    for one, two in zip(*results, strict=True):
        assert one.drawn.tolist() == two.drawn.tolist()
        for name in ("log_probs", "log_masses", "drawn_log_probs"):
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=0, atol=1e-5)


def test_rows_and_weights(model):
    """The same refusals as the Megatron engine's; rows begun with other weights must not go on."""
    arch, chunk = model
    language_model = WholeTexts(chunk, arch.vocab_size)
    engine = PromptEngine(language_model, arch.vocab_size, 1, 8, 0)
    row = engine.open([1, 2])
    with pytest.raises(UserError, match="room for"):
        engine.open([1])
    with pytest.raises(UserError, match="9 tokens"):
        engine.step([Extend(row, [1] * 7)])
    assert engine.length(row) == 2
    with pytest.raises(UserError, match="temperature"):
        engine.step([Extend(row, [1])], temperature=0.0)
    with pytest.raises(UserError, match="tokenizer"):
        engine.token_set([arch.vocab_size])
    with pytest.raises(RuntimeError, match="rows are open"):
        engine.weights_version = 1
    assert language_model.updates == 0
    engine.close(row)
    engine.weights_version = 1
    assert (engine.weights_version, language_model.updates) == (1, 1)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_live_weights(make_model, family):
    """Weights that arrive under another name, in another order, or with the vocabulary's padding."""
    arch, (chunk,) = make_model(family, 101)
    twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch.to_hf())).eval()
    wanted = set(twin.state_dict()) - ({"lm_head.weight"} if arch.tied_embeddings else set())
    named = dict(live_hf_tensors(dict(chunk.named_parameters()), arch))
    assert set(named) == wanted
    twin.load_state_dict(named, strict=False)
    ids = list(range(1, 30))
    with torch.no_grad():
        expected = twin(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    np.testing.assert_allclose(full_log_probs(chunk, 101, ids), expected, rtol=0, atol=1e-4)


def test_factory(model, parallel):
    """The wrong engine, or the right one without what was configured."""
    arch, chunk = model
    settings = {"train": {"steps": 1}, "latent": {"max_batch": 3, "tokens_per_forward": 17}}
    engine = build_rollout_engine(config_from_dict(settings), [chunk], arch, parallel, 40, weights_version=7)
    assert isinstance(engine, MegatronEngine)
    assert (engine.max_batch, engine.max_tokens, engine.weights_version, engine._tokens_per_forward) == (3, 40, 7, 17)
    vllm = config_from_dict(settings, ["latent.engine=vllm"])
    with pytest.raises(UserError, match=r"latent\.engine=vllm needs vLLM; .*'ra3-megatron\[vllm\]'"):
        build_rollout_engine(vllm, [chunk], arch, parallel, 40)
    split = dataclasses.replace(parallel, sizes=dataclasses.replace(parallel.sizes, tensor=2))
    with pytest.raises(UserError, match=r"parallel\.tensor 2 x .*set these to 1"):
        build_rollout_engine(vllm, [chunk], arch, split, 40)
    with pytest.raises(UserError, match=r"vLLM draws one more"):
        build_rollout_engine(vllm, [chunk], arch, parallel, arch.max_positions)
    with pytest.raises(UserError, match=r"latent\.vllm_memory = 1\.5"):
        config_from_dict(settings, ["latent.vllm_memory=1.5"])
