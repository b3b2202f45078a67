"""Fused Adam against torch's, and its state."""

import copy

import pytest
import torch

from ra3_megatron.parallel.fused_adam import FusedAdam


def _run(optimizer, params, steps, start=0):
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def _params():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (300, 7)]


@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch(decoupled):
    """Bias correction off by one step, or weight decay in the wrong place, still trains."""
    ours, theirs = _params(), _params()
    _run(FusedAdam(ours, lr=0.1, weight_decay=0.1, adam_w_mode=decoupled), ours, 6)
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    _run(cls(theirs, lr=0.1, weight_decay=0.1), theirs, 6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_dict_resumes_bit_for_bit():
    """`step` per parameter was lost on load and bias correction started again."""
    params = _params()
    optimizer = FusedAdam(params, lr=0.1)
    _run(optimizer, params, 3)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = FusedAdam(again, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _run(optimizer, params, 2, 3)
    _run(resumed, again, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert resumed.param_groups[0]["step"] == 5


def test_groups_without_gradients_do_not_count():
    """An empty shard (more ranks than parameters) made the step counts of groups differ on save."""
    params = _params()
    optimizer = FusedAdam([{"params": [params[0]]}, {"params": [torch.nn.Parameter(torch.empty(0))]}])
    _run(optimizer, [params[0]], 2)
    assert [g.get("step", 0) for g in optimizer.param_groups] == [2, 0]


def test_options_of_transformer_engine_are_refused():
    """A precision-aware optimizer that silently was an ordinary one."""
    with pytest.raises(ValueError, match="master_weights"):
        FusedAdam(_params(), master_weights=True)
