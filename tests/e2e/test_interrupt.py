"""Asked to save and make way in every stage with a loop: exit code 85, and the same command gives the same weights."""

import json

import pytest
import torch

from ra3_megatron.config import control
from tests.e2e.small import all_tensors, write_config


def leave_and_return(server, arguments, world, variables):
    """Run until it is done, asked to leave at the first chance of every attempt; returns the exit codes."""
    codes = []
    while not codes or codes[-1] != 0:
        ended = server.cli(arguments, world=world, timeout=150, variables=variables)
        assert len({e.code for e in ended}) == 1, [(e.code, e.err[-1500:]) for e in ended]
        codes.append(ended[0].code)
        assert len(codes) < 60, ended[0].out[-2000:]
        assert codes[-1] in (0, control.EXIT_GO_ON), ended[0].err[-3000:]
    return codes


@pytest.mark.parametrize("world", [1, 2])
def test_asked_at_every_step(world, server, tmp_path):
    """A save on request that was not one of the schedule, or a rank that left while the other went on."""
    config = str(write_config(tmp_path, train={"steps": 6, "eval_interval": 0}, checkpoint={"interval": 4}))
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    assert {e.code for e in server.cli(["midtrain", config, f"run.dir={whole}"], world=world)} == {0}
    variables = {control.MUST_SAVE_BY: "1.0"}
    arguments = ["midtrain", config, f"run.dir={asked}"]
    codes = leave_and_return(server, arguments, world, variables)
    assert codes == [control.EXIT_GO_ON] * 5 + [0], "one step per attempt"
    results = [json.loads((run / "01-ntp" / "DONE").read_text()) for run in (whole, asked)]
    assert results[0]["parameters_sha256"] == results[1]["parameters_sha256"]
    a, b = (all_tensors(run / results[0]["checkpoint"] / "dist") for run in (whole, asked))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_stop_file_is_another_exit_code(server, tmp_path):
    """A stopped run was taken for one that wants to go on."""
    config = str(write_config(tmp_path, train={"steps": 6, "eval_interval": 0}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / control.STOP_FILE).touch()
    (ended,) = server.cli(["midtrain", config])
    assert ended.code == control.EXIT_STOPPED, ended.err[-2000:]
    assert "stop file" in ended.out
    assert list((tmp_path / "run").glob("01-ntp/checkpoints/step_*/DONE")), "it saved before it left"


def test_two_nodes_with_a_process_each(server, tmp_path):
    """The number of processes on a node was given to Megatron as that of all: no group had both."""
    config = str(write_config(tmp_path, train={"steps": 3, "eval_interval": 0}, export={"enabled": False}))
    node = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    ended = server.cli(["midtrain", config], world=2, timeout=150, variables=node)
    assert [e.code for e in ended] == [0, 0], "\n".join(e.err[-2000:] for e in ended)
    states = [json.loads(p.read_text()) for p in (tmp_path / "run").glob("01-ntp/checkpoints/*/state.json")]
    assert {state["layout"]["data"] for state in states} == {2}
