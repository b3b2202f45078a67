"""The handle of a single process."""

import random

import numpy as np
import pytest
import torch

from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.parallel import collectives
from ra3_megatron.parallel.groups import GROUP_NAMES, initialize, seed_everything


def test_alone_without_environment(parallel):
    """A plain `python script.py` must not need torchrun."""
    assert parallel.world_size == 1
    assert parallel.is_first_stage
    assert parallel.is_last_stage
    assert parallel.data_rank == parallel.tensor_rank == parallel.context_rank == 0
    assert [parallel.group(n).ranks for n in GROUP_NAMES] == [(0,)] * len(GROUP_NAMES)
    assert parallel.pg_collection.tp.size() == 1


def test_collectives_of_one(parallel):
    """Types must not change with the number of ranks."""
    world = parallel.world
    assert collectives.all_reduce_sum(world, 3, "n") == 3
    assert isinstance(collectives.all_reduce_sum(world, 3, "n"), int)
    assert isinstance(collectives.all_reduce_max(world, 3.5, "n"), float)
    assert collectives.gather_objects(world, "a", "n") == ["a"]
    assert collectives.broadcast_object(world, "a", "n") == "a"
    collectives.barrier(world, "n")
    with pytest.raises(RuntimeError, match="no communication here"), collectives.deadline(world, "n", 5):
        raise RuntimeError("no communication here")


def test_seeds_repeat_within_a_process(parallel):
    """A second seeding raised "seed already exists", or went on where the first had left."""

    def draw():
        seed_everything(5, parallel)
        from megatron.core import tensor_parallel

        with tensor_parallel.get_cuda_rng_tracker().fork():
            forked = torch.rand(2).tolist()
        return random.random(), float(np.random.rand()), torch.rand(2).tolist(), forked  # noqa: NPY002

    assert draw() == draw()


def test_two_lives_in_one_process(parallel):
    """Groups of a first stage were still there when the second stage started."""
    with pytest.raises(RuntimeError, match="exist already"):
        initialize()
    parallel.shutdown()
    parallel.shutdown()
    with initialize(ParallelConfig(timeout_s=5)) as again:
        assert again.world.timeout_s == 5
    assert not torch.distributed.is_initialized()
