"""Rollouts on a GPU: CUDA graphs against the same passes without, and the log-probs of the trainer."""

import warnings

import numpy as np
import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import LatentConfig
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.optional import have_te
from ra3_megatron.rollout.budget import fitting_rows
from ra3_megatron.rollout.cache import ChunkCache
from ra3_megatron.rollout.engine import Extend, Query
from tests.gpu.rollouts import ARCH, PRECISIONS, build, engine_of, sample, trainers

GAPS = {"bf16": (0.5, 0.05), "fp8": (3.0, 0.3)}
"""Largest and mean difference between log-probs of rollouts and of the trainer, nats: rounding (0.06 and 0.014 on a CPU
in BF16). FP8 rounds to 3 bits, by scales that depend on what else is in the batch."""


@pytest.fixture(scope="module", params=list(PRECISIONS))
def chunks(request, parallel):
    """A model of every precision and kind of layers; those of Transformer Engine where it is."""
    model = PRECISIONS[request.param]
    if (model.precision == "fp8" or model.layers == "te") and not have_te():
        pytest.skip("needs Transformer Engine")
    return build(model, parallel)


def same(first, second):
    for a, b in zip(first[0], second[0], strict=True):
        assert a == b
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.0])
def test_graphs_change_nothing(chunks, parallel, top_p):
    """A graph that reads an input from where it was captured, or forgets a step of the draw."""
    replayed, run = engine_of(chunks, parallel), engine_of(chunks, parallel, graphs=False)
    # Fewer and fewer sizes are new: the second time nearly all passes are replays.
    for seed in (0, 1):
        same(sample(replayed, 12, 40, seed, top_p), sample(run, 12, 40, seed, top_p))
    assert not replayed._decoder.graphs.broken
    assert replayed.counters.graph_passes > 0.5 * replayed.counters.decode_passes
    assert run.counters.graph_passes == 0


def test_graphs_follow_the_weights(chunks, parallel):
    """Replays with the quantised weights of before an update, or from memory that a weight has left."""
    replayed, run = engine_of(chunks, parallel), engine_of(chunks, parallel, graphs=False)
    before = sample(replayed, 6, 30)
    sample(replayed, 6, 30)
    parameters = [p for p in unwrap(chunks[0]).parameters() if p.dim() == 2]
    kept = [p.detach().clone() for p in parameters]
    captured = dict(replayed._decoder.graphs._captured)
    try:
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.05)
        replayed.weights_version = run.weights_version = 1
        after = sample(replayed, 6, 30)
        same(after, sample(run, 6, 30))
        assert not np.array_equal(after[1], before[1])
        if not unwrap(chunks[0]).config.fp8:  # Transformer Engine may put quantised weights elsewhere
            assert all(replayed._decoder.graphs._captured[key] is graph for key, graph in captured.items())
        # Elsewhere: what was captured is of no use any more.
        for p in parameters:
            p.data = p.data.clone()
        replayed.weights_version = run.weights_version = 2
        sample(replayed, 6, 30)
        same(sample(replayed, 6, 30), sample(run, 6, 30))
        assert not any(replayed._decoder.graphs._captured.get(key) is graph for key, graph in captured.items())
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, kept, strict=True):
                p.copy_(value)


def test_log_probs_are_the_trainers(chunks, parallel, request):
    """Positions, masks or rotations that differ between rollout and training bias every importance weight."""
    precision = "fp8" if unwrap(chunks[0]).config.fp8 else "bf16"
    engine = engine_of(chunks, parallel)
    texts, found = sample(engine, 12, 60)
    gap = np.abs(found - trainers(chunks, parallel, texts, 60))
    print(f"{request.node.name}: largest gap {gap.max():.4f}, mean {gap.mean():.5f} nats")
    most, mean = GAPS[precision]
    assert gap.max() < most
    assert gap.mean() < mean
    if precision == "fp8":
        assert gap.max() > 0, "equal to the last bit: was it FP8 at all?"


def test_rollouts_leave_no_trace_in_training(chunks, parallel):
    """Largest numbers of sampled tokens in the history that the trainer's next scales are made of."""
    histories = [
        m.fp8_meta["scaling_fwd"].amax_history
        for m in chunks[0].modules()
        if hasattr(getattr(m, "fp8_meta", {}).get("scaling_fwd"), "amax_history")
    ]
    before = [h.clone() for h in histories]
    sample(engine_of(chunks, parallel), 6, 30)
    for history, kept in zip(histories, before, strict=True):
        assert torch.equal(history, kept)


def test_packed_prompts(chunks, parallel):
    """One attention call for all prompts against one for each, with and without what is cached before."""
    packed, loop = engine_of(chunks, parallel), engine_of(chunks, parallel)
    assert packed._forward.packs
    forward = loop._forward
    forward.packs = False
    forward.caches = [ChunkCache(c, forward.slots, forward.length, parallel.device) for c in chunks]
    chance = np.random.default_rng(0)
    first = [chance.integers(ARCH.vocab_size, size=n).tolist() for n in (1, 200, 17, 90, 3, 2)]
    steps = [
        [chance.integers(ARCH.vocab_size, size=n).tolist() for n in s] for s in ((60, 1, 30, 2, 5, 9), (1, 40) * 3)
    ]
    found = []
    for engine in (packed, loop):
        rows = [engine.open(t) for t in first]
        answers = [engine.step([Extend(r, n) for r, n in zip(rows, news, strict=True)]) for news in steps]
        found.append(np.concatenate([a.log_probs for step in answers for a in step]))
    most, mean = GAPS["fp8" if unwrap(chunks[0]).config.fp8 else "bf16"]
    gap = np.abs(found[0] - found[1])
    assert gap.max() < most
    assert gap.mean() < mean


def test_a_decode_pass_waits_once(chunks, parallel):
    """Each read of a number by the host waits for the device: a pass has one, that of its answers."""
    engine = engine_of(chunks, parallel, graphs=False)
    every = engine.token_set(np.arange(ARCH.vocab_size))
    rows = [engine.open([1, 2, 3 + i]) for i in range(8)]

    def step():
        engine.step([Extend(r, (), (Query(0, every, 0.5),), append=True) for r in rows])

    for _ in range(4):
        step()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in found if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


def test_rows_fit_into_the_free_memory(parallel):
    """Rows of more memory than there is: the engine took it from the training that comes after."""
    chunks = build(PRECISIONS["bf16, torch"], parallel)
    latent = LatentConfig(max_batch=100_000_000, cache_share=0.01)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    rows = fitting_rows(latent, chunks, parallel, 1000)
    before = torch.cuda.memory_allocated()
    engine = engine_of(chunks, parallel, rows, 1000)
    taken = torch.cuda.memory_allocated() - before
    assert 0.95 * taken < engine.cache_bytes <= 0.0101 * free
    with pytest.raises(UserError, match=r"a row; found .* \(latent\.cache_share = 1e-09 of"):
        fitting_rows(LatentConfig(cache_share=1e-9), chunks, parallel, 1000)
