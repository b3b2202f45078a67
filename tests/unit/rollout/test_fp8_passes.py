"""What Transformer Engine's FP8 layers are told about the passes of rollouts; their state is stood in for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ra3_megatron.model.fp8_passes import histories_kept, token_multiple, weight_addresses
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.megatron import MegatronEngine


@pytest.fixture
def quantised(make_model):
    """A model whose first linear layer keeps quantised weights as Transformer Engine's do, and counts its tokens."""
    arch, (chunk,) = make_model("qwen2", 101)
    chunk.config.fp8, chunk.config.fp8_recipe = "hybrid", "delayed"
    layer = chunk.decoder.layers[0].self_attention.linear_qkv
    layer.is_first_microbatch = True
    seen: list[tuple[bool, int]] = []

    def before(module, args):
        seen.append((module.is_first_microbatch, len(args[0])))
        module.is_first_microbatch = False
        state = getattr(module, "fp8_meta", None)
        if state is None:
            module.fp8_meta = state = {"scaling_fwd": SimpleNamespace(amax_history=torch.zeros(4, 3))}
        state["scaling_fwd"].amax_history[0] += 1

    layer.register_forward_pre_hook(before)
    return arch, chunk, layer, seen


def test_new_weights_are_quantised_once(quantised, parallel):
    """Rollouts after an update ran with the quantised weights from before it: nothing outside of Megatron's schedule
    says that they have changed."""
    arch, chunk, _, seen = quantised
    engine = MegatronEngine([chunk], arch, parallel, 4, 40)
    number = engine.token_set(np.arange(101))

    def rollout():
        row = engine.open([1, 2, 3])
        for _ in range(3):
            engine.step([Extend(row, (), (Query(0, number, 0.5),), append=True)])
        engine.close(row)

    rollout()
    assert [first for first, _ in seen] == [True, False, False]
    rollout()
    assert not any(first for first, _ in seen[3:])
    engine.weights_version = 1
    rollout()
    assert [first for first, _ in seen[6:]] == [True, False, False]
    # Who trains without saying so has been in training mode.
    chunk.train()
    rollout()
    assert [first for first, _ in seen[9:]] == [True, False, False]
    assert {tokens % 16 for _, tokens in seen} == {0}


def test_rollouts_leave_no_trace_in_scales(quantised, parallel):
    """The next training step's scales depended on what had been sampled before it."""
    arch, chunk, layer, seen = quantised
    engine = MegatronEngine([chunk], arch, parallel, 4, 40)
    row = engine.open([1])
    engine.step([Extend(row, [2, 3, 4])])
    history = layer.fp8_meta["scaling_fwd"].amax_history
    assert history.abs().sum() == 0, "histories that rollouts have made begin with zeros"
    history.copy_(torch.arange(12.0).view(4, 3))
    engine.step([Extend(row, [5, 6])])
    assert len(seen) == 2
    assert torch.equal(history, torch.arange(12.0).view(4, 3))
    chunk.config.fp8_recipe = "tensorwise"
    with histories_kept([chunk]):
        history[0] = 9.0
    assert history[0].tolist() == [9.0] * 3


def test_multiples(quantised):
    """Half a block of mxfp8, or padding where nothing is quantised."""
    chunk = quantised[1]
    found = []
    for fp8, recipe in ((None, "delayed"), ("hybrid", "delayed"), ("e4m3", "blockwise"), ("e4m3", "mxfp8")):
        chunk.config.fp8, chunk.config.fp8_recipe = fp8, recipe
        found.append(token_multiple(chunk.config))
    assert found == [1, 16, 16, 32]


def test_moved_weights_are_noticed(quantised):
    """A CUDA graph read the memory that a weight had left."""
    _, chunk, layer, _ = quantised
    before = weight_addresses([chunk])
    assert weight_addresses([chunk]) == before
    layer.weight.data.add_(1.0)
    assert weight_addresses([chunk]) == before, "a step of the optimizer moves nothing"
    workspace = SimpleNamespace(_data=torch.zeros(4), _transpose=None, get_data_tensors=lambda: ())
    layer._fp8_workspaces = {"weight": workspace}
    with_copy = weight_addresses([chunk])
    assert with_copy != before
    workspace._transpose = torch.zeros(4)
    assert weight_addresses([chunk]) == with_copy, "the backward pass's copy is not read"
    workspace._data = torch.zeros(4)
    assert weight_addresses([chunk]) != with_copy
    kept = layer.weight.data
    layer.weight.data = kept.clone()
    assert weight_addresses([chunk])[: len(before)] != before
