"""One process's groups, and models and engines of a few thousand weights on the stand-in for Transformer Engine."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from ra3_megatron.checkpoint.fp8_state import put_back
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_chunks, unwrap
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine

ARCH = Architecture("qwen3", 4, 64, 4, 2, 16, 96, 101, False, qkv_bias=False, qk_norm=True, max_positions=64)
SEQ = 32


@pytest.fixture(scope="module")
def parallel():
    """A single-process `Parallel`, shut down after the module."""
    with initialize() as handle:
        yield handle


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """gloo joins the all-gathers of BF16 and FP8 weights in one BF16 tensor and rounds the latter; NCCL does not."""
    buffers = "megatron.core.distributed.param_and_grad_buffer"
    monkeypatch.setattr(f"{buffers}._coalescing_manager", lambda *_args, **_options: nullcontext())


@pytest.fixture(autouse=True)
def _state():
    """Scales of the delayed recipe are updated for all modules of a process: those of the test before are forgotten."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def config(**model) -> RunConfig:
    return config_from_dict(
        {
            "train": {"steps": 10, "seq_length": SEQ, "global_batch_size": 2},
            "model": {"vocab_multiple": 8, "fp8_probe_interval": 0, "fp8_health_interval": 0, **model},
            "optimizer": {"lr": 1e-2},
        }
    )


def engine(parallel: Parallel, use_te: bool = True, **model) -> TrainEngine:
    settings = config(**model)
    seed_everything(3, parallel)
    chunks = build_chunks(ARCH, settings.model, parallel, use_te)
    if settings.model.fp8_params:
        # Megatron fills weights on a CPU after they were made, past what the optimizer takes for their initial values.
        seed_everything(3, parallel)
        plain = build_chunks(ARCH, replace(settings.model, fp8_params=False), parallel, use_te)
        weights = {k: v for k, v in unwrap(plain[0]).state_dict().items() if not k.endswith("_extra_state")}
        put_back(chunks[0], weights)
    return TrainEngine(settings, ARCH, parallel, chunks, [cross_entropy_component()], 10)


def batch(seed: int) -> TrainBatch:
    """A window of two sequences and padding."""
    g = torch.Generator().manual_seed(seed)
    lengths = (12, 16, 4)
    weight = torch.ones(SEQ)
    weight[[11, 27, 28, 29, 30, 31]] = 0.0
    return TrainBatch(
        input_ids=torch.randint(ARCH.vocab_size, (SEQ,), generator=g),
        labels=torch.randint(ARCH.vocab_size, (SEQ,), generator=g),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, 12, 28, 32], dtype=torch.int32),
        max_seqlen=16,
        weights={"cross_entropy": weight},
    )
