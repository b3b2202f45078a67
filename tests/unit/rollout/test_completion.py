"""Completions against transformers' `generate` and a loop of plain forward passes without cache or batch."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.tokenizers import train_bpe
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.rollout.completion import CompletionSettings, Prompt, complete
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.unit.model.hf_pairs import ARCHITECTURES, load, megatron_weights, random_hf
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import SOURCE

ROOM = 96
BEYOND = 5
"""Rows of the embedding that no id of the tokenizer has."""


@cache
def tokenizer():
    """Tokens of several characters, and every byte as a token: characters of several bytes need several tokens."""
    return train_bpe([SOURCE * 3], 300)


def twins(family, parallel, seed=0):
    """(architecture, chunks, the same model in transformers)"""
    arch = dataclasses.replace(ARCHITECTURES[family], vocab_size=tokenizer().vocab_size + BEYOND)
    hf = random_hf(arch, seed)
    chunks = build_model(arch, ModelConfig(vocab_multiple=8), parallel)
    load(chunks, megatron_weights(arch, hf, unwrap(chunks[0]).vocab_size), parallel)
    return arch, chunks, hf


@pytest.fixture(scope="module")
def qwen(parallel):
    return twins("qwen2", parallel)


def made_prompts(count, seed=0, longest=40):
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, longest, size=count)
    return [Prompt(chance.integers(tokenizer().vocab_size, size=n).astype(np.int32), i) for i, n in enumerate(lengths)]


def engine_of(model, parallel, **options):
    return MegatronEngine(model[1], model[0], parallel, **({"max_batch": 4, "max_tokens": ROOM} | options))


def naive(chunk, prompt, options, seed, room=ROOM):
    """Ids and log-probabilities of one completion until an id of `stop_ids` or the length; texts are not looked at."""
    ids, log_probs = prompt.ids.tolist(), []
    uniforms = np.random.default_rng([seed, prompt.number, prompt.member]).random(options.max_tokens)
    real = tokenizer().vocab_size
    while len(log_probs) < min(options.max_tokens, room - len(prompt.ids)):
        found = full_log_probs(chunk, real + BEYOND, ids, options.temperature or 1.0)[-1].numpy()
        allowed = np.exp(found[:real])
        if options.temperature == 0:
            token = int(found[:real].argmax())
        else:
            order = np.argsort(-allowed, kind="stable")
            kept = order[: 1 + np.searchsorted(allowed[order].cumsum(), options.top_p * allowed.sum())]
            weights = np.zeros(real)
            weights[kept] = allowed[kept]
            token = int(np.searchsorted(weights.cumsum(), uniforms[len(log_probs)] * weights.sum(), side="right"))
        ids.append(token)
        log_probs.append(found[token])
        if token in options.stop_ids:
            break
    return ids[len(prompt.ids) :], log_probs


def same_as_naive(found, chunk, options, seed, room=ROOM):
    for completion in found:
        ids, log_probs = naive(chunk, completion.prompt, options, seed, room)
        assert completion.ids.tolist() == ids
        np.testing.assert_allclose(completion.log_probs, log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_greedy_is_what_transformers_generates(family, parallel):
    """Scores that shift with the length of the others in the batch, a row that goes on from another's cache."""
    model = twins(family, parallel)
    prompts = made_prompts(11)
    options = CompletionSettings(max_tokens=30, temperature=0.0, stop_ids=(7,))
    found = complete(engine_of(model, parallel), prompts, options, tokenizer(), seed=0)
    ends = set()
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion.prompt is prompt
        with torch.no_grad():
            expected = model[2].generate(
                torch.from_numpy(prompt.ids).long().unsqueeze(0),
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
                max_new_tokens=30,
                do_sample=False,
                eos_token_id=7,
                pad_token_id=0,
                suppress_tokens=list(range(tokenizer().vocab_size, model[0].vocab_size)),
            )
        assert completion.ids.tolist() == expected[0, len(prompt.ids) :].tolist()
        ends.add(completion.finish)
    same_as_naive(found[:3], model[1][0], options, 0)
    assert "length" in ends


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8), (1.0, 0.05)])
def test_sampled_ones_are_drawn_one_by_one(qwen, parallel, temperature, top_p):
    """A temperature that is forgotten in the log-probability, a set cut at the wrong end, numbers of another row."""
    options = CompletionSettings(25, temperature, top_p, stop_ids=(11, 30))
    found = complete(engine_of(qwen, parallel), made_prompts(9), options, tokenizer(), seed=3)
    assert top_p < 0.1 or len({len(c.ids) for c in found}) > 1
    same_as_naive(found, qwen[1][0], options, 3)
