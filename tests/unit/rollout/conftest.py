"""One process's groups, tiny models with decided opinions, and plain full forward passes to compare with."""

import dataclasses

import pytest
import torch

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from tests.unit.model.hf_pairs import ARCHITECTURES


@pytest.fixture(scope="module")
def parallel():
    """A single-process `Parallel`, shut down after the module."""
    with initialize() as handle:
        seed_everything(0, handle)
        yield handle


@pytest.fixture(scope="module")
def make_model(parallel):
    """(family, vocabulary) → (architecture, chunks); weights large enough that distributions are far from flat."""

    def make(family, vocab_size, seed=0):
        arch = dataclasses.replace(ARCHITECTURES[family], num_layers=2, vocab_size=vocab_size)
        seed_everything(seed, parallel)
        return arch, build_model(arch, ModelConfig(init_std=0.2, vocab_multiple=8), parallel)

    return make


@torch.no_grad()
def full_log_probs(chunk, vocab_size, ids, temperature=1.0):
    """[tokens, vocabulary]: row i is the distribution of token i + 1; the model's ordinary forward pass, no cache."""
    tokens = torch.tensor(ids).unsqueeze(0)
    logits = chunk(input_ids=tokens, position_ids=torch.arange(len(ids)).unsqueeze(0), attention_mask=None)
    return (logits[0, :, :vocab_size].double() / temperature).log_softmax(-1)
