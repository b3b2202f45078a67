"""Where RLVR alone starts from: a checkpoint folder, or the last checkpoint of an arm in a run folder."""

import json
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import RunConfig, load_config
from ra3_megatron.stages.graph import graph
from ra3_megatron.stages.run_folder import RunFolder

TRAINED = ("rlvr", "sft", "ntp", "base")
"""Stages whose checkpoint can be started from."""


def start_checkpoint(config: RunConfig) -> Path:
    """The checkpoint folder that `rlvr.start` and `rlvr.start_arm` mean. Raises UserError when there is none."""
    assert config.rlvr.start is not None
    path = Path(config.rlvr.start)
    if (path / "architecture.json").is_file() and is_done(path):
        if config.rlvr.start_arm is not None:
            raise UserError(
                f"rlvr.start_arm is {config.rlvr.start_arm} and rlvr.start {path} is one checkpoint; leave the arm out"
            )
        return path
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"rlvr.start is {path}; neither a finished checkpoint nor a run; give a checkpoint folder (with DONE "
            "and architecture.json) or the run.dir of a run"
        )
    return _of_run(path, config.rlvr.start_arm)


def _of_run(path: Path, arm: str | None) -> Path:
    run = load_config(path / "config.yaml")
    wanted = arm if arm is not None else next(iter(run.run.arms), "")
    if wanted and wanted not in run.run.arms:
        raise UserError(f"rlvr.start_arm is {arm}; the run {path} has {', '.join(run.run.arms) or 'no arms'}")
    folder = RunFolder(path)
    found = [(folder.stage(i, n.name), n) for i, n in enumerate(graph(run)) if n.kind in TRAINED and n.arm == wanted]
    if not found:
        raise UserError(f"the run {path} trains no model for arm {wanted or '(none)'}; give another run.dir")
    stage, node = found[-1]
    if not stage.done:
        raise UserError(f"rlvr.start is {path}; its stage {node.name} is not done; finish that run first")
    return path / json.loads((stage.path / "DONE").read_text(encoding="utf-8"))["checkpoint"]
