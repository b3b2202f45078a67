"""Packing, batches, context-parallel shards and the order of windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.batch import collate, context_parallel_slice
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.packing import PackedWindows, TrainSequence, pack, padded, train_sequence
from ra3_megatron.data.sampler import WindowSampler
from ra3_megatron.data.store import write_store
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.data.trajectory import Kind, TrajectoryBuilder, splice


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 64), max_size=200),
    multiple=st.sampled_from([1, 4, 16]),
    buffer=st.sampled_from([7, 1000]),
    seed=st.integers(0, 3),
)
def test_every_sequence_is_in_one_window_that_holds_it(
    lengths: list[int], multiple: int, buffer: int, seed: int
) -> None:
    array = np.array(lengths, dtype=np.int64)
    packing = pack(array, 64, multiple, seed, buffer)
    assert sorted(packing.order.tolist()) == np.flatnonzero(array).tolist()
    for w in range(len(packing)):
        assert 0 < padded(array[packing.window(w)], multiple).sum() <= 64
    again = pack(array, 64, multiple, seed, buffer)
    assert np.array_equal(again.order, packing.order)
    assert np.array_equal(again.ends, packing.ends)


def test_packing_is_tight_and_seeded() -> None:
    """Lengths as a split corpus has them: many nearly full pieces and a tail of short ones."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(960, 1024, 2000), rng.integers(8, 1024, 1000)])
    packing = pack(lengths, 1024)
    bound = max(lengths.sum() / 1024, (lengths > 512).sum())
    assert len(packing) <= 1.01 * bound
    assert not np.array_equal(packing.order, pack(lengths, 1024, seed=1).order)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="windows hold 64"):
        pack(np.array([65]), 64)
    with pytest.raises(UserError, match="multiple of 6"):
        pack(np.array([5]), 64, 6)


def sequence(n: int, start: int) -> TrainSequence:
    ids = np.arange(start, start + n, dtype=np.int32)
    weight = np.ones(n, np.float32)
    return TrainSequence(
        ids, {"cross_entropy": weight}, {"adv": ids.astype(np.float32)}, np.full(n, Kind.CODE, np.uint8)
    )


def test_collate_by_hand() -> None:
    """Labels stay inside their sequence; per-token arrays move one place with them; padding has weight 0."""
    batch = collate([[sequence(3, 10), sequence(2, 20)], [sequence(8, 30)]], 8, 99, 2, ["policy"])
    assert batch.input_ids.tolist() == [10, 11, 12, 99, 20, 21, 99, 99, *range(30, 38)]
    assert batch.labels.tolist() == [11, 12, 99, 99, 21, 99, 99, 99, *range(31, 38), 99]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8, 16]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 8
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, *range(8)]
    assert batch.weights["cross_entropy"].tolist() == [1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert batch.weights["policy"].tolist() == [0.0] * 16
    counted = batch.weights["cross_entropy"] > 0
    assert torch.equal(batch.extras["adv"][counted], batch.labels[counted].float())
    assert batch.kinds is not None
    assert torch.equal(batch.kinds == Kind.CODE, counted)
    with pytest.raises(ValueError, match="needs"):
        collate([[sequence(5, 0), sequence(4, 0)]], 8, 0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.sampled_from([2, 4]))
def test_context_parallel_shards_cover_the_batch(lengths: list[int], size: int) -> None:
    """Each rank holds chunks r and 2n-1-r of every sequence; together every token once."""
    sequences = [sequence(n, 100 * i) for i, n in enumerate(lengths)]
    packing = pack(np.array(lengths), 48, 2 * size)
    windows = [[sequences[i] for i in packing.window(w)] for w in range(len(packing))]
    batch = collate(windows, 48, 0, 2 * size)
    shards = [context_parallel_slice(batch, rank, size) for rank in range(size)]
    for rank, shard in enumerate(shards):
        position = 0
        for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            chunk = (b - a) // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                whole = slice(a + number * chunk, a + (number + 1) * chunk)
                own = slice(position, position + chunk)
                for name in ("input_ids", "labels", "position_ids", "kinds"):
                    assert torch.equal(getattr(shard, name)[own], getattr(batch, name)[whole])
                assert torch.equal(shard.extras["adv"][own], batch.extras["adv"][whole])
                assert torch.equal(shard.weights["cross_entropy"][own], batch.weights["cross_entropy"][whole])
                position += chunk
        assert position * size == len(batch.input_ids)
    assert context_parallel_slice(batch, 0, 1) is batch
    with pytest.raises(ValueError, match="multiple"):
        context_parallel_slice(collate([[sequence(3, 0)]], 48, 0), 0, size)


def test_windows_of_a_store(tmp_path: Path, bpe: Tokenizer, stdlib_texts: list[str]) -> None:
    """The end token follows a document's last piece only; the prompt and the first token have no weight."""
    made = TrajectoryBuilder(bpe, ThinkTokens(bpe), bpe.eos_id)
    pieces = [p for code in stdlib_texts[:10] for p in made.pieces(made.build(code), code, 255)[0]]
    store = write_store(tmp_path / "s", pieces, made.think_tokens)
    windows = PackedWindows(store, 256, bpe.eos_id)
    total = 0
    for number in range(len(windows)):
        batch = collate([windows[number]], 256, bpe.pad_id)
        total += int(batch.weights["cross_entropy"].sum())
        assert len(batch.input_ids) == 256
    assert total == sum(len(p.ids) - 1 + p.ends_document for p in pieces)
    assert PackedWindows(store, 256, bpe.eos_id, seed=1).fingerprint != windows.fingerprint
    piece = next(p for p in pieces if p.decisions)
    thought = bpe.encode("# because\n")
    infused = splice(piece, {piece.decisions[0].line: thought})
    both, code = (train_sequence(infused, None, on).weights["cross_entropy"].sum() for on in ("all", "code"))
    assert both - code == len(thought)


def consumed(sampler: WindowSampler, data_size: int, micro: int, batches: int) -> list[list[int]]:
    """Windows of each global batch, all ranks together, in a sorted list."""
    copies = []
    state = sampler.state_dict()
    for rank in range(data_size):
        own = WindowSampler(sampler.num_windows, sampler.global_batch_size, 5, "d")
        own.load_state_dict(state)
        iterator = own.batches_for(rank, data_size, micro)
        copies.append([next(iterator) for _ in range(batches)])
        assert copies[-1][0].windows.shape == (sampler.global_batch_size // data_size // micro, micro)
    sampler.load_state_dict(own.state_dict())
    return [sorted(i for c in copies for i in c[k].windows.ravel().tolist()) for k in range(batches)]


def test_global_batches_do_not_depend_on_the_layout() -> None:
    """A run resumed on other ranks with other micro-batches must see the data it would have seen."""
    straight = consumed(WindowSampler(50, 12, 5, "d"), 1, 12, 12)
    resumed = WindowSampler(50, 12, 5, "d")
    parts = consumed(resumed, 4, 3, 5) + consumed(resumed, 2, 1, 3) + consumed(resumed, 3, 2, 4)
    assert parts == straight
    stream = WindowSampler(50, 12, 5, "d").windows(0, 150)
    for epoch in range(3):
        assert sorted(stream[50 * epoch : 50 * epoch + 50].tolist()) == list(range(50))
    assert stream[:50].tolist() != stream[50:100].tolist()
    assert resumed.state.consumed == 144
    assert resumed.epoch == pytest.approx(2.88)


def test_sampler_refuses_another_data_set() -> None:
    sampler = WindowSampler(50, 12, 5, "d")
    state = sampler.state_dict()
    with pytest.raises(UserError, match="data set"):
        WindowSampler(50, 12, 5, "other").load_state_dict(state)
    with pytest.raises(UserError, match="seed"):
        WindowSampler(50, 12, 6, "d").load_state_dict(state)
    with pytest.raises(UserError, match="multiple of 8"):
        sampler.batches_for(0, 8, 1)
    with pytest.raises(UserError, match="no windows"):
        WindowSampler(0, 12, 5, "d")
