"""The graph of a run: which stages there are, in which order, and which one `--stage` means."""

import itertools

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import ARMS
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.stages.graph import find, graph

SHAPE = {
    "family": "qwen2", "num_layers": 2, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
    "ffn_hidden_size": 32, "vocab_size": 300, "tied_embeddings": True, "qkv_bias": True, "max_positions": 64,
}  # fmt: skip


def config(arms: list[str], rounds: int = 1, **sections) -> RunConfig:
    return config_from_dict(
        {"run": {"arms": arms, "rounds": rounds}, "model": {"architecture": SHAPE}, "base": {"tokens": 100}, **sections}
    )


def names(c: RunConfig) -> list[str]:
    return [node.name for node in graph(c)]


def test_the_plain_baseline_alone_is_four_stages_without_measurement():
    assert names(config(["ntp"], base={"tokens": 0})) == ["prepare", "ntp", "export"]


def test_ra3_in_two_rounds_goes_on_from_the_weights_of_the_first():
    nodes = {node.name: node for node in graph(config(["ra3"], rounds=2))}
    assert list(nodes) == [
        "prepare", "prepare-base", "base",
        "ra3-variational-1", "ra3-generate-1", "ra3-sft-1", "ra3-variational-2", "ra3-generate-2", "ra3-sft-2",
        "export", "measure",
    ]  # fmt: skip
    assert nodes["ra3-variational-1"].needs == ("prepare", "base")
    assert nodes["ra3-variational-2"].needs == ("prepare", "ra3-sft-1")
    assert nodes["export"].needs[-1] == "ra3-sft-2"


def test_only_arms_with_an_e_step_have_one():
    kinds = {arm: [n.kind for n in graph(config([arm])) if n.arm] for arm in ARMS}
    assert kinds == {
        "ra3": ["variational", "generate", "sft"],
        "brite": ["variational", "generate", "sft"],
        "bolt": ["generate", "sft"],
        "self_comment": ["generate", "sft"],
        "ntp": ["ntp"],
    }


@pytest.mark.parametrize("rounds", [1, 3])
def test_every_stage_comes_after_what_it_needs_and_has_a_name_of_its_own(rounds):
    for arms in itertools.permutations(ARMS, 3):
        seen: set[str] = set()
        for node in graph(config(list(arms), rounds)):
            assert set(node.needs) <= seen, node
            assert node.name not in seen
            seen.add(node.name)


def test_a_stage_is_found_by_kind_arm_and_round():
    c = config(["ntp", "ra3", "brite"], rounds=2)
    assert find(c, "variational").name == "ra3-variational-1"
    assert find(c, "sft", "brite", 2).name == "brite-sft-2"
    assert find(c, "ntp").name == "ntp"
    assert find(c, "measure").name == "measure"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("rlvr", None, None), "no stage rlvr; its stages are prepare, "),
        (("sft", "bolt", None), "no stage sft of arm bolt"),
        (("sft", None, 3), "no stage sft in round 3"),
        (("export", None, 1), "belongs to no arm"),
    ],
)
def test_a_stage_that_is_not_there_is_refused_with_those_that_are(asked, says):
    with pytest.raises(UserError, match=says):
        find(config(["ra3"], rounds=2), *asked)


TASKS = {"steps": 3, "tasks": "tasks.jsonl"}


def test_rlvr_comes_after_every_arm_and_is_exported():
    """The arm before RLVR was exported, or the second arm's RLVR began from the first one's weights."""
    nodes = {n.name: n for n in graph(config(["ra3", "ntp"], rlvr=TASKS, evaluation={"benchmarks": ["humaneval"]}))}
    assert list(nodes) == [
        "prepare", "prepare-base", "base", "tasks", "ra3-variational-1", "ra3-generate-1", "ra3-sft-1", "ntp",
        "ra3-rlvr", "ntp-rlvr", "export", "measure", "evaluate",
    ]  # fmt: skip
    assert nodes["ra3-rlvr"].needs == ("prepare", "tasks", "ra3-sft-1")
    assert nodes["ntp-rlvr"].needs == ("prepare", "tasks", "ntp")
    assert nodes["export"].needs[-1] == "ra3-rlvr"
    assert nodes["measure"].needs == ("prepare", "base", "ra3-sft-1", "ntp")
    assert nodes["evaluate"].needs == ("prepare", "base", "ra3-sft-1", "ntp", "ra3-rlvr", "ntp-rlvr")
    assert find(config(["ra3", "ntp"], rlvr=TASKS), "rlvr", "ntp").name == "ntp-rlvr"


def test_rlvr_alone_prepares_a_corpus_for_its_base_only():
    """RLVR of a model that is brought along read the standard library first."""
    brought = {"base": {"tokens": 0}, "model": {"source": "m"}, "rlvr": TASKS}
    assert names(config([], **brought)) == ["import", "tasks", "rlvr", "export"]
    assert names(config([], **{**brought, "model": {}, "rlvr": {**TASKS, "start": "run"}})) == [
        "tasks", "rlvr", "export",
    ]  # fmt: skip
    assert names(config([], rlvr=TASKS)) == ["prepare", "prepare-base", "base", "tasks", "rlvr", "export"]
    assert find(config([], **brought), "rlvr").arm == ""
