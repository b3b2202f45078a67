"""Tests that need a GPU: `python -m pytest tests/gpu -q -rs`, about five minutes on one Hopper GPU.

They need torch, megatron-core, Transformer Engine and this project, no network and no model files. Without a GPU all
are skipped, and without Transformer Engine those that need it; `-rs` says why, `-s` shows the figures.
"""

import os

import pytest
import torch

from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.model.optional import transformer_engine
from ra3_megatron.parallel.groups import initialize
from ra3_megatron.parallel.launch import Launch

NO_GPU = "" if torch.cuda.is_available() else "no CUDA device on this machine"


def pytest_collection_modifyitems(items):
    """Mark everything here `gpu`, and skip it where there is none."""
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if NO_GPU:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def parallel():
    """This process alone on its GPU, groups over NCCL."""
    with initialize(ParallelConfig(timeout_s=120), Launch(0, 1, 0, 1, "alone", None, None)) as handle:
        yield handle


@pytest.fixture
def te():
    """Skips where Transformer Engine cannot be used, saying why."""
    found = transformer_engine()
    if not found.usable:
        pytest.skip(found.reason)


@pytest.fixture
def hopper(te):
    """Skips on chips older than Hopper, which have no FP8 with a scale per block."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability()}; the recipes need 9.0")


@pytest.fixture(autouse=True)
def _tidy():
    """What a test leaves behind on the device, in Transformer Engine's global state and in torch's switches."""
    yield
    if not torch.cuda.is_available():
        return
    torch.use_deterministic_algorithms(False)
    for name in ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        os.environ.pop(name, None)
    if transformer_engine().usable:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    torch.cuda.empty_cache()
