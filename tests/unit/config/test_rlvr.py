"""Rules of the rlvr section, alone and together with others."""

from dataclasses import replace
from typing import Any

import pytest

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import estimate_memory
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.run import config_from_dict, without_arms
from ra3_megatron.config.validate import resolve_layout, sides

SHAPE = Architecture("qwen2", 2, 32, 4, 2, 8, 64, 512, True, True, max_positions=512)
AHEAD: dict[str, Any] = {"max_lag": 1, "draw_ahead": True}
EIGHT: dict[str, Any] = {"global_batch_size": 8}
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
        (2, {"parallel": {"generation_replicas": 2}, "rlvr": AHEAD}, "of 2 replicas; both sides need one"),
        (2, {"parallel": {"generation_replicas": -1}, "rlvr": AHEAD}, "lower it to 0"),
        (2, {"parallel": {"generation_replicas": 1}}, "one side would always wait"),
        (4, {"parallel": {"generation_replicas": 1}, "rlvr": AHEAD, "train": EIGHT}, "3 training replicas x 1 updates"),
        (4, {"parallel": {"generation_replicas": 3}, "rlvr": AHEAD, "train": EIGHT}, "3 generating replicas"),
        (
            2,
            {
                "parallel": {"generation_replicas": 1},
                "rlvr": AHEAD,
                "model": {"precision": "fp8", "fp8_recipe": "delayed"},
            },
            "fp8_recipe is delayed",
        ),
        (2, {"parallel": {"generation_replicas": 1, "expert": 2}, "rlvr": AHEAD}, "parallel.expert is 2"),
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
        ("draw_ahead", True, "set max_lag to 1"),
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


def test_replicas_that_generate() -> None:
    """A replica on both sides; a job of a stage that is not divided, refused for the sides' shares."""
    parallel = {"tensor": 2, "pipeline": 2, "generation_replicas": 1}
    found = layout(12, parallel=parallel, rlvr=AHEAD, train={"global_batch_size": 12})
    assert (found.data, found.generating) == (3, 1)
    assert "replicas that train 2 (processes 0-7), that generate 1 (8-11)" in sides(found)
    config = config_from_dict({"model": {"source": "m"}, "rlvr": RLVR | AHEAD, "parallel": parallel})
    assert resolve_layout(without_arms(config), 4, SHAPE, splits=False).generating == 0
    unused = config_from_dict({"run": {"arms": ["ntp"]}, "train": {"steps": 1}, "parallel": {"generation_replicas": 1}})
    with pytest.raises(UserError, match="no stage of this run would use them"):
        resolve_layout(unused, 2, SHAPE)


def test_memory_where_some_replicas_generate() -> None:
    """A layout that was said to fit: moments shared with replicas that have none, or refused for a cache it lacks."""
    config = config_from_dict({"model": {"source": "m"}, "rlvr": RLVR | AHEAD, "train": {"global_batch_size": 24}})
    divided = replace(config, parallel=replace(config.parallel, generation_replicas=1))
    two, three = (
        estimate_memory(c, SHAPE, resolve_layout(without_arms(c), n, SHAPE)) for c, n in ((config, 2), (divided, 3))
    )
    assert three.optimizer == two.optimizer > 0
    assert three.cache == 0 < two.cache


@pytest.mark.parametrize(("max_lag", "ahead", "steps"), [(0, False, 1), (3, False, 4), (1, True, 1), (3, True, 2)])
def test_steps_drawn_at_once(max_lag: int, ahead: bool, steps: int) -> None:
    """Answers older than max_lag: drawn ahead, those of the last step wait for two draws' steps less one."""
    r = RlvrConfig(max_lag=max_lag, draw_ahead=ahead)
    assert r.draw_steps == steps
    assert steps * (1 + ahead) - 1 == max_lag
