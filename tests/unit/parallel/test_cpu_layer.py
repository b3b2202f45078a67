"""The CPU layer: every redirected name, every Megatron subsystem that breaks without it."""

import tempfile

import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.parallel import cpu_layer
from ra3_megatron.parallel.cpu_layer import REDIRECTIONS, install, resolve

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer is off where CUDA is there")


@pytest.mark.parametrize("entry", REDIRECTIONS, ids=lambda e: e.target)
def test_every_entry_stands_where_the_table_says(parallel, entry):
    """A name that moved in Megatron or torch was patched into nothing, and the call site failed much later."""
    holder, name = resolve(entry.target)
    before = {e.target: original for e, original in cpu_layer.originals()}[entry.target]
    assert getattr(holder, name) is not before
    assert entry.why


def test_torch_still_says_there_is_no_gpu(parallel):
    """Code that asks must take its CPU path; a faked device count sent DataLoader to pinned memory."""
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    with pytest.raises(RuntimeError, match=r"(?i)cuda|nvidia"):
        torch.cuda.get_device_properties(0)


def test_factories_and_tensors_come_out_on_the_cpu(parallel):
    """`device="cuda"` and pinned memory are what Megatron asks for."""
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0), pin_memory=True),
        torch.empty_like(torch.ones(2), device="cuda"),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda", dtype=torch.float64),
        torch.ones(2).pin_memory(),
    ):
        assert tensor.device.type == "cpu"
    assert torch.ones(2).to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_install_is_idempotent_and_checks_the_version(parallel, monkeypatch):
    """An unchecked release ran with half of its call sites patched."""
    kept = torch.zeros
    assert install()
    assert torch.zeros is kept
    monkeypatch.setattr(cpu_layer.importlib.metadata, "version", lambda _name: "0.16.1")
    with pytest.raises(UserError, match=r"0\.19\.2; found 0\.16\.1"):
        cpu_layer.check_version()


def test_with_cuda_nothing_is_touched(monkeypatch):
    """On a GPU the layer must not exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_layer, "_installed", False)
    assert install() is False
    assert not cpu_layer.is_installed()


# ---------------------------------------------------------------- Megatron's subsystems, one by one


def test_rng_tracker_and_recompute(parallel):
    """model_parallel_cuda_manual_seed and activation recompute: tensor_parallel/random.py:118, :303."""
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    before = torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before), "the default stream must not move inside a fork"
    with tracker.fork():
        assert not torch.equal(torch.rand(3), first), "the forked stream must move on"
    weight = torch.randn(4, requires_grad=True)

    def noisy(x):
        return torch.nn.functional.dropout(x * weight, 0.5).sum()

    x = torch.ones(4, requires_grad=True)
    state = torch.get_rng_state()
    noisy(x).backward()
    plain, weight.grad = weight.grad.clone(), None
    torch.set_rng_state(state)
    tensor_parallel.checkpoint(noisy, False, x).backward()
    assert torch.equal(weight.grad, plain), "recompute must draw the same dropout mask"


def test_causal_mask_memory_buffer_and_broadcast(parallel):
    """transformer/utils.py:39, utils.py:715, tensor_parallel/data.py:37."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    buffer = parallel_state.get_global_memory_buffer().get_tensor((2, 3), torch.float32, "probe")
    assert buffer.shape == (2, 3)
    data = {"a": torch.arange(6).view(2, 3)}
    out = tensor_parallel.broadcast_data(["a"], data, torch.int64)
    assert torch.equal(out["a"], data["a"])


def test_context_parallel_rope(parallel):
    """rope_utils.py:62 pins memory."""
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    table = torch.arange(4.0).view(4, 1, 1, 1)
    assert torch.equal(get_pos_emb_on_this_cp_rank(table, 0, parallel.group("cp").device_group), table)


def test_grad_scaler_timers_and_rerun(parallel):
    """grad_scaler.py:20, timers.py:152, rerun_state_machine.py:979."""
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler
    from megatron.core.rerun_state_machine import RerunStateMachine
    from megatron.core.timers import Timers

    assert ConstantGradScaler(2.0).scale.item() == 2.0
    timers = Timers(log_level=1, log_option="all")
    timers("probe", log_level=1).start(barrier=True)
    timers("probe").stop()
    assert timers("probe").elapsed() >= 0
    RerunStateMachine()._save_state()


def _train(parallel, precision):
    """A tiny model under DDP and the distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from ra3_megatron.config.sections import ModelConfig
    from ra3_megatron.model.factory import build_model, unwrap
    from ra3_megatron.parallel.groups import seed_everything
    from tests.unit.model.hf_pairs import ARCHITECTURES

    seed_everything(11, parallel)
    [chunk] = build_model(ARCHITECTURES["qwen3"], ModelConfig(vocab_multiple=8, precision=precision), parallel)
    config = unwrap(chunk).config
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp, chunk, pg_collection=parallel.pg_collection)
    options = OptimizerConfig(
        lr=1e-2, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True, bf16=precision == "bf16"
    )
    return chunk, get_megatron_optimizer(options, [chunk])


def _step(chunk, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 131, (2, 24), generator=generator)
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    logits = chunk(ids, torch.arange(24).expand(2, -1), None)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    chunk.finish_grad_sync()
    ok, norm, _ = optimizer.step()
    assert ok
    return float(loss.detach()), float(norm)


def _sharded(parallel, chunk, optimizer, loading):
    from ra3_megatron.model.factory import unwrap

    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": parallel.group("dp_cp").device_group}
    model = unwrap(chunk).sharded_state_dict(metadata=metadata)
    return {"model": model, "optimizer": optimizer.sharded_state_dict({"model": model}, loading, metadata=metadata)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distributed_optimizer_resumes_bit_for_bit(parallel, precision):
    """Saved with torch's Adam the distributed optimizer could not be loaded: KeyError 'step'."""
    from megatron.core import dist_checkpointing

    chunk, optimizer = _train(parallel, precision)
    for number in range(2):
        _step(chunk, optimizer, number)
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(_sharded(parallel, chunk, optimizer, False), folder)
        expected = [_step(chunk, optimizer, number) for number in (2, 3)]
        again, resumed = _train(parallel, precision)
        _step(again, resumed, 99)
        state = dist_checkpointing.load(_sharded(parallel, again, resumed, True), folder)
    from ra3_megatron.model.factory import unwrap

    unwrap(again).load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert [_step(again, resumed, number) for number in (2, 3)] == expected
    for (name, a), b in zip(chunk.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
