"""Rows of the engine from the memory they may take."""

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import LatentConfig
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.rollout.budget import fitting_rows
from ra3_megatron.rollout.factory import build_rollout_engine

GIB = 2**30
ROW = 2 * 2 * 2 * 16 * 4 * 64
"""Keys and values x layers x key heads x width x fp32 x (50 tokens and one of padding, up to a multiple of 16)."""


def test_rows_of_a_budget(make_model, parallel):
    """A budget that holds seven and a half rows gave eight, or the real cache was larger than the budget."""
    arch, chunks = make_model("qwen2", 101)
    assert fitting_rows(LatentConfig(max_batch=64), chunks, parallel, 50) == 64
    assert fitting_rows(LatentConfig(max_batch=64, cache_gib=7.5 * ROW / GIB), chunks, parallel, 50) == 7
    assert fitting_rows(LatentConfig(max_batch=5, cache_gib=7.5 * ROW / GIB), chunks, parallel, 50) == 5
    settings = {"train": {"steps": 1}, "latent": {"cache_gib": 7.5 * ROW / GIB}}
    engine = build_rollout_engine(config_from_dict(settings), chunks, arch, parallel, 50)
    assert engine.max_batch == 7
    assert engine.cache_bytes == 7 * ROW


def test_not_even_one(make_model, parallel):
    """No room for a row was an engine of no rows, which waits for ever."""
    _, chunks = make_model("qwen2", 101)
    with pytest.raises(UserError, match=r"rollouts of 50 tokens need .* GiB .* found .* \(latent.cache_gib = "):
        fitting_rows(LatentConfig(cache_gib=0.9 * ROW / GIB), chunks, parallel, 50)


def test_settings_out_of_range():
    """A share above 1 and a budget of nothing."""
    with pytest.raises(UserError, match=r"latent\.cache_share = 1\.5"):
        LatentConfig(cache_share=1.5)
    with pytest.raises(UserError, match=r"latent\.cache_gib = 0"):
        LatentConfig(cache_gib=0)
