"""What a comparison refuses before it trains, and what the runs of its seeds share."""

import json
import os
from pathlib import Path

import pytest

from ra3_megatron.cli import app
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.stages.compare import SEEDLESS, _plan, _up_to_variational, link_stages
from tests.unit.training import tiny


def config(folder: Path, **sections: dict[str, object]) -> RunConfig:
    base: dict[str, dict[str, object]] = {
        "run": {"dir": str(folder)},
        "model": {"architecture": tiny.architecture().to_dict()},
        "base": {"tokens": 100},
        "train": {"steps": None, "tokens": 1000},
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return tiny.config(**base)


@pytest.mark.parametrize(
    ("sections", "arms", "seeds", "prices", "message"),
    [
        ({"train": {"steps": 5, "tokens": None}}, ["ntp", "ra3"], [1], [], r"train\.steps is 5.*train\.tokens"),
        ({}, ["ntp", "ra3"], [1, 1], [], r"seeds \[1, 1\].*each once"),
        ({}, ["ntp", "ra3"], [], [], "one or more"),
        ({}, ["ntp", "RA3"], [1], [], "give one or more of ra3, ntp"),
        ({}, ["ntp"], [1], [], "two or more"),
        ({"run": {"rounds": 2}}, ["ntp", "ra3"], [1], [], "ntp has no rounds"),
        ({"data": {"validation_fraction": 0}}, ["ntp", "ra3"], [1], [], "held-out code; raise it"),
        ({"base": {"tokens": 0}}, ["ntp", "ra3"], [1], [], r"neither model\.source nor base\.tokens"),
        ({}, ["ntp", "ra3"], [1], [-0.1], r"variational\.price"),
        (
            {"variational": {"kl": "bernoulli", "log_latents": 9.0}}, ["ntp", "ra3"], [1], [0.1],
            "which has no price",
        ),
    ],
)  # fmt: skip
def test_refused_before_anything_is_made(tmp_path, sections, arms, seeds, prices, message):
    """Hours of training of arms that do not compare."""
    with pytest.raises(UserError, match=message):
        _plan(config(tmp_path, **sections), arms, seeds, prices)
    assert not list(tmp_path.iterdir())


def test_plan(tmp_path):
    """One folder per seed and price; the E-step of a seed is not repeated for its own price."""
    plan = _plan(config(tmp_path), ["ntp", "ra3"], [3, 1], [0.05, 0.2])
    assert [(s, c.run.dir, c.run.seed, c.run.arms) for s, c in plan.seeds.items()] == [
        (3, str(tmp_path / "seed-3"), 3, ("ntp", "ra3")), (1, str(tmp_path / "seed-1"), 1, ("ntp", "ra3")),
    ]  # fmt: skip
    assert list(plan.prices) == [0.2]
    own = plan.prices[0.2]
    assert (own.run.dir, own.run.seed, own.variational.price) == (str(tmp_path / "price-0.2"), 3, 0.2)
    names = [node.name for node in _up_to_variational(own)]
    assert names == ["prepare", "prepare-base", "base", "ra3-variational-1"]
    without = _plan(config(tmp_path), ["ntp", "self_comment"], [3], [0.05])
    assert list(without.prices) == [0.05], "no seed runs this E-step"


def test_linked_stages(tmp_path):
    """A half-made corpus taken over; a base model of another seed; two runs that write into the same file."""
    first, second = _plan(config(tmp_path), ["ntp", "ra3"], [1, 2], []).seeds.values()
    for name, done in (("00-prepare", True), ("01-prepare-base", False), ("02-base", True)):
        folder = tmp_path / "seed-1" / name
        (folder / "logs" / "0001").mkdir(parents=True)
        (folder / "logs" / "latest").symlink_to("0001")
        (folder / "ids.bin").write_bytes(b"content")
        if done:
            (folder / "DONE").write_text("{}")
    link_stages(first, second, SEEDLESS)
    made = tmp_path / "seed-2"
    assert [p.name for p in made.iterdir()] == ["00-prepare"]
    assert (made / "00-prepare" / "ids.bin").read_bytes() == b"content"
    assert os.path.samefile(made / "00-prepare" / "ids.bin", tmp_path / "seed-1" / "00-prepare" / "ids.bin")
    assert os.readlink(made / "00-prepare" / "logs" / "latest") == "0001"
    before = (made / "00-prepare").stat().st_ino
    link_stages(first, second, SEEDLESS)
    assert (made / "00-prepare").stat().st_ino == before, "what is done is left alone"


@pytest.mark.parametrize(("option", "value"), [("--seeds", "1,two"), ("--prices", "0.1;0.2")])
def test_lists_on_the_command_line(tmp_path, option, value):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({}))
    with pytest.raises(UserError, match=f"{option} {value}: give values with commas"):
        app(["compare", str(path), option, value], standalone_mode=False)
