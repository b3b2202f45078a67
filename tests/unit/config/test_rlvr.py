"""Rules of the rlvr section, alone and together with others."""

from typing import Any

import pytest

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict, without_arms
from ra3_megatron.config.validate import resolve_layout

SHAPE = Architecture("qwen2", 2, 32, 4, 2, 8, 64, 512, True, True, max_positions=512)
RLVR: dict[str, Any] = {"steps": 4, "tasks": "t.jsonl", "prompts_per_step": 8}


def layout(world: int = 1, **sections: dict[str, Any]):
    given = {"model": {"source": "m"}, "rlvr": RLVR}
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return resolve_layout(without_arms(config_from_dict(given)), world, SHAPE)


def test_rlvr_alone_needs_no_length_of_training() -> None:
    """train.steps was asked for although nothing is mid-trained."""
    assert layout().data == 1


@pytest.mark.parametrize(
    ("world", "sections", "said"),
    [
        (1, {"rlvr": {"start": "runs/x"}}, "rlvr.start is runs/x, but"),
        (1, {"model": {"source": None}}, "nothing to start from"),
        (2, {"rlvr": {"minibatches": 8}}, "use 16"),
        (2, {"parallel": {"context": 2}}, "set parallel.context to 1"),
        (2, {"parallel": {"tensor": 2}, "latent": {"engine": "vllm"}}, "vLLM gets the weights whole"),
        (1, {"train": {"seq_length": 256}, "rlvr": {"max_tokens": 256}}, "no room for a prompt"),
    ],
)
def test_what_does_not_fit_together(world: int, sections: dict[str, Any], said: str) -> None:
    """Found out after the model was loaded, or never."""
    with pytest.raises(UserError, match=said):
        layout(world, **sections)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("group_size", 1, "at least 2"),
        ("temperature", 0.0, "above 0"),
        ("overlong", "soft", "overlong_buffer"),
        ("template", "no place", "lacks {prompt}"),
        ("minibatches", 3, "no multiple"),
        ("lr", 0.0, "above 0"),
        ("warmup_steps", 4, "warm-up shorter"),
        ("tasks", None, "name the file"),
        ("aggregation", "mean", "Invalid value"),
        ("layout", "mbbp", "layout"),
    ],
)
def test_single_fields(field: str, value: Any, said: str) -> None:
    """A value that cannot work was taken."""
    with pytest.raises(UserError, match=said):
        config_from_dict({"rlvr": {**RLVR, field: value}})


def test_without_steps_there_is_nothing_to_run() -> None:
    """`ra3 rlvr` on a configuration for mid-training did nothing and said that it was done."""
    with pytest.raises(UserError, match=r"rlvr\.steps is 0"):
        without_arms(config_from_dict({}))
    with pytest.raises(UserError, match="nothing would be trained"):
        resolve_layout(config_from_dict({"run": {"arms": []}}), 1, SHAPE)
