"""Rank and world size from torchrun's and srun's variables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.parallel.groups import ParallelSizes
from ra3_megatron.parallel.launch import first_host, launch_from_env

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}  # fmt: skip  # noqa: E501
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70001", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "gpu[03-04],x9", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}  # fmt: skip  # noqa: E501


def test_torchrun():
    """The plain case: everything is said."""
    found = launch_from_env(TORCHRUN)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (5, 8, 1, 4)
    assert (found.address, found.port, found.source) == ("n0", 29500, "torchrun")


def test_srun_without_master_address():
    """srun sets no MASTER_ADDR: every rank waited for itself. First node and a port from the job's number agree."""
    found = launch_from_env(SRUN)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (5, 8, 1, 4)
    assert (found.address, found.port, found.source) == ("gpu03", 15000 + 70001 % 20000, "srun")
    assert launch_from_env(SRUN | {"SLURM_PROCID": "0"}).port == found.port


def test_batch_script_itself_is_one_process():
    """In the batch script SLURM_NTASKS names tasks that no srun has started: a command there waited for them."""
    env = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}
    assert launch_from_env(env).world == 1


def test_alone_and_torchrun_wins():
    """torchrun inside an srun step must not be read as srun."""
    assert launch_from_env({}).source == "alone"
    assert launch_from_env(SRUN | TORCHRUN).source == "torchrun"


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "x"}, "whole number"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 does not exist"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR"),
    ],
)
def test_incomplete_environment_is_refused(env, text):
    """A missing variable ended in a hang at the rendezvous."""
    with pytest.raises(UserError, match=text):
        launch_from_env(env)


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("gpu[03-05,9]", "gpu03"), ("r1n[7]-ib,x", "r1n7-ib")]
)
def test_first_host(nodes, first):
    """Slurm compresses node names; the leading zero belongs to the name."""
    assert first_host(nodes) == first


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_sizes_multiply_to_the_world(tensor, pipeline, context, data):
    """Whatever fits is taken as it is."""
    world = tensor * pipeline * context * data
    sizes = ParallelSizes.from_config(ParallelConfig(tensor=tensor, pipeline=pipeline, context=context), world)
    assert sizes.data == data
    assert sizes.tensor * sizes.pipeline * sizes.context * sizes.data == sizes.world == world


@pytest.mark.parametrize(
    ("config", "world", "text"),
    [
        (ParallelConfig(tensor=2), 3, "3 were started"),
        (ParallelConfig(data=4), 2, "start 4 processes"),
        (ParallelConfig(sequence=True), 1, "tensor > 1"),
        (ParallelConfig(virtual_pipeline=2), 1, "at least 2"),
        (ParallelConfig(tensor=0), 1, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit(config, world, text):
    """The message carries the arithmetic instead of an assertion inside Megatron."""
    with pytest.raises(UserError, match=text):
        ParallelSizes.from_config(config, world)
