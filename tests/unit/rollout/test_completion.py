"""Completions against transformers' `generate` and a loop of plain forward passes without cache or batch."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig, TrainConfig
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.data.tokenizers import train_bpe
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.rollout.completion import CompletionSettings, Prompt, Writer, complete
from ra3_megatron.rollout.engine import Answer
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import score_labels
from ra3_megatron.rollout.vllm import PromptEngine
from ra3_megatron.training.schedule import pack_micro_batches
from tests.unit.model.hf_pairs import ARCHITECTURES, load, megatron_weights, random_hf
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import SOURCE
from tests.unit.rollout.test_vllm import WholeTexts

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


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_same_whatever_else_is_in_the_batch(qwen, parallel, temperature):
    """Random numbers by place in the batch, a row that moves to another's cache, a long prompt read in pieces."""
    options = CompletionSettings(30, temperature, 0.95, stop_ids=(11, 30, 60))
    prompts = [Prompt(p.ids, p.number, m) for p in made_prompts(6, longest=60) for m in range(3)]
    alone = complete(engine_of(qwen, parallel, max_batch=1), prompts, options, tokenizer(), seed=5)
    assert len({len(c.ids) for c in alone}) > 4 or temperature == 0
    for engine, count in (
        (engine_of(qwen, parallel, max_batch=64), 18),
        (engine_of(qwen, parallel, max_batch=5, tokens_per_forward=7), 18),
        (PromptEngine(WholeTexts(qwen[1][0], qwen[0].vocab_size), qwen[0].vocab_size, 4, ROOM, 0), 6),
    ):
        ended = []
        found = complete(engine, prompts[:count], options, tokenizer(), 5, on_done=ended.append)
        for one, other in zip(alone[:count], found, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert (one.finish, one.text_bytes) == (other.finish, other.text_bytes)
            np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=1e-5)
        assert sorted(map(id, ended)) == sorted(map(id, found)), "each is announced once"
        assert not engine._rows
    other_order = complete(engine_of(qwen, parallel), prompts[::-1], options, tokenizer(), seed=5)[::-1]
    assert [c.ids.tolist() for c in other_order] == [c.ids.tolist() for c in alone]


def test_a_prompt_is_read_once_for_all_its_completions(qwen, parallel):
    """Sixteen completions of a long prompt cost sixteen readings of it."""
    engine = engine_of(qwen, parallel, max_batch=8)
    prompt = made_prompts(1, longest=60)[0]
    prompt = Prompt(np.resize(prompt.ids, 60).astype(np.int32), 0)
    options = CompletionSettings(10, 1.0)
    found = complete(engine, [Prompt(prompt.ids, 0, m) for m in range(8)], options, tokenizer(), 1)
    drawn = sum(len(c.ids) for c in found)
    # The last token of the prompt is read by each, the last drawn one by none.
    assert engine.counters.tokens == 59 + 8 + drawn - 8
    assert engine.counters.forward_passes == 11
    same_as_naive(found, qwen[1][0], options, 1)


def reference_end(pieces, stops, stop_ids, ids):
    """Looked for in the whole text after every token: (tokens, finish, bytes of the text)."""
    for count in range(1, len(ids) + 1):
        text = b"".join(pieces[i] for i in ids[:count])
        if ids[count - 1] in stop_ids:
            return count, "stop_id", len(text) - len(pieces[ids[count - 1]])
        places = [text.find(s) for s in stops if s in text]
        if places:
            return count, "stop", min(places)
    return len(ids), "length", len(text)


@given(
    st.lists(st.sampled_from([b"a", b"b", b"ab", b"\n", b"\xc3", b"\xa9", b"", b"aab\n", "é!".encode()]), min_size=1,
             max_size=12),
    st.lists(st.sampled_from(["ab\n", "b", "é", "aa", "bab", "é!\n"]), max_size=3, unique=True),
    st.sets(st.integers(0, 11), max_size=1),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_stop_texts_are_found_where_they_end(pieces, stops, stop_ids):
    """A stop text over the border of tokens, in the middle of a token, of bytes that are half a character each."""
    options = CompletionSettings(len(pieces), 0.0, 1.0, tuple(stops), tuple(stop_ids))
    writer = Writer(0, 0, Prompt(np.ones(1, np.int32), 0), options, np.zeros(len(pieces)), pieces, 0)
    done, ids = None, list(range(len(pieces)))
    for token in ids:
        done = writer.absorb(Answer(np.zeros(0), np.zeros(1), np.array([token]), np.zeros(1)))
        if done is not None:
            break
    count, finish, text_bytes = reference_end(pieces, [s.encode() for s in stops], stop_ids, ids)
    assert (len(done.ids), done.finish, done.text_bytes) == (count, finish, text_bytes)


def test_stop_texts_of_a_real_completion(qwen, parallel):
    """The text before a stop text was cut at a token's border; what was drawn is kept whole."""
    prompts, long = made_prompts(6), CompletionSettings(30, 1.0)
    whole = complete(engine_of(qwen, parallel), prompts, long, tokenizer(), seed=9)
    texts = [tokenizer().decode_bytes(c.ids) for c in whole]
    stop = next(texts[0][at : at + 2] for at in range(6, 40) if texts[0][at : at + 2].isascii()).decode()
    options = CompletionSettings(30, 1.0, stop=(stop, "no such text"))
    for before, after, text in zip(
        whole, complete(engine_of(qwen, parallel), prompts, options, tokenizer(), seed=9), texts, strict=True
    ):
        assert before.ids[: len(after.ids)].tolist() == after.ids.tolist()
        assert tokenizer().decode_bytes(after.ids)[: after.text_bytes] == text.partition(stop.encode())[0]
        assert after.finish == ("stop" if stop.encode() in text else "length")


def test_room_and_refusals(qwen, parallel):
    """A prompt without room found out after an hour of sampling; ids of another tokenizer; a stop text of nothing."""
    engine = engine_of(qwen, parallel, max_tokens=20)
    prompts = [Prompt(np.full(n, 5, np.int32), n) for n in (19, 15, 1)]
    found = complete(engine, prompts, CompletionSettings(8, 1.0), tokenizer(), 0)
    assert [(len(c.ids), c.finish) for c in found] == [(1, "length"), (5, "length"), (8, "length")]
    assert {c.weights_version for c in found} == {0}
    before = engine.counters.tokens
    for length in (0, 20):
        with pytest.raises(UserError, match=f"prompt 7 has {length} tokens"):
            complete(engine, [*prompts, Prompt(np.full(length, 5, np.int32), 7)], CompletionSettings(8), tokenizer(), 0)
    with pytest.raises(UserError, match=r"stop_ids has 300"):
        complete(engine, prompts, CompletionSettings(8, stop_ids=(300,)), tokenizer(), 0)
    assert engine.counters.tokens == before
    assert complete(engine, [], CompletionSettings(8), tokenizer(), 0) == []
    with pytest.raises(ZeroDivisionError):
        complete(engine, prompts, CompletionSettings(8), tokenizer(), 0, on_done=lambda _: 1 / 0)
    engine.weights_version = 1  # refused while rows are open
    for bad in ({"stop": ("",)}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}, {"max_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            CompletionSettings(**({"max_tokens": 4} | bad))


def test_padding_of_the_embedding_is_never_drawn(parallel):
    """Ids that the tokenizer does not have came out of rows that no text ever trained."""
    arch, (chunk,), _ = twins("llama3", parallel)
    with torch.no_grad():
        # All of them about as probable, those past the tokenizer's own by far the most.
        chunk.output_layer.weight.mul_(0.01)
        chunk.output_layer.weight[tokenizer().vocab_size :] *= 300
    for temperature in (0.0, 1.0):
        options = CompletionSettings(20, temperature)
        found = complete(engine_of((arch, [chunk]), parallel), made_prompts(4), options, tokenizer(), 0)
        assert max(c.ids.max() for c in found) < tokenizer().vocab_size
        same_as_naive(found, chunk, options, 0)


def test_log_probs_are_the_trainers(qwen, parallel):
    """Behaviour log-probs that differ from the trainer's at equal weights bias every importance weight."""
    arch, chunks, _ = qwen
    temperature = 0.7
    found = complete(engine_of(qwen, parallel), made_prompts(8), CompletionSettings(30, temperature), tokenizer(), 2)
    sequences = [
        TrainSequence(np.concatenate((c.prompt.ids, c.ids)), {}, {"behaviour": _after(c.prompt.ids, c.log_probs)})
        for c in found
    ]
    train = TrainConfig(steps=1, seq_length=128, micro_batch_size=2)
    batches, _ = pack_micro_batches(sequences, train, parallel, extras=("behaviour",))
    scores = torch.cat(score_labels(chunks, arch, parallel, batches, temperature))
    behaviour = torch.cat([b.extras["behaviour"] for b in batches])
    sampled = behaviour != 0
    assert int(sampled.sum()) == sum(len(c.ids) for c in found)
    gap = float((scores - behaviour)[sampled].abs().max())
    print(f"largest gap between sampled and trained log-probs at temperature {temperature}: {gap:.1e}")
    assert gap <= 1e-5


def _after(prompt, values):
    return np.concatenate((np.zeros(len(prompt)), values)).astype(np.float32)
