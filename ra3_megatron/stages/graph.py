"""The stages of a run and what each needs, from the configuration alone."""

from dataclasses import dataclass

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import THINKING_ARMS
from ra3_megatron.config.run import RunConfig

SHARED = ("import", "prepare", "prepare-base", "base", "tasks", "export", "measure", "evaluate")
"""Stages that belong to no arm."""

OF_ARMS = ("variational", "generate", "sft", "ntp", "rlvr")
"""Stages of an arm; all but `ntp` and `rlvr` come once per round. RLVR alone belongs to no arm."""

ONE_PROCESS = ("import", "prepare", "prepare-base", "tasks", "export")
"""Stages that one process does, while others would only wait: a job of its own takes one, whatever the layout."""


@dataclass(frozen=True)
class Node:
    """One stage of a run."""

    name: str
    """Name of its folder after the number, such as `ra3-sft-2`; unique in the run."""
    kind: str
    """What is done: one of `SHARED` or `OF_ARMS`."""
    needs: tuple[str, ...]
    """Names of the stages that must be DONE before."""
    arm: str = ""
    """Arm it belongs to; empty for shared stages."""
    round: int = 0
    """EM round, from 1; 0 where there is none."""


def graph(config: RunConfig) -> tuple[Node, ...]:
    """All stages, in an order in which each comes after what it needs."""
    nodes: list[Node] = []

    def add(name: str, kind: str, *needs: str, arm: str = "", round: int = 0) -> str:
        nodes.append(Node(name, kind, tuple(n for n in needs if n), arm, round))
        return name

    start = add("import", "import") if config.model.source is not None else ""
    # RLVR alone, from a model that is brought along, needs no corpus.
    corpus = add("prepare", "prepare", start) if config.run.arms or config.base.tokens else ""
    if config.base.tokens:
        start = add("base", "base", add("prepare-base", "prepare-base", corpus))
    # Early, so that a bad file of tasks is refused before the arms are trained.
    tasks = add("tasks", "tasks", start, corpus) if config.rlvr.steps else ""
    trained = [_add_arm(add, config, arm, corpus, start) for arm in config.run.arms]
    final = trained
    if tasks:
        names = [(f"{arm}-rlvr", arm, end) for arm, end in zip(config.run.arms, trained, strict=True)]
        names = names or [("rlvr", "", start)]
        final = [add(name, "rlvr", corpus, tasks, end, arm=arm) for name, arm, end in names]
    if config.export.enabled:
        add("export", "export", corpus, final[0])
    if measured(config):
        add("measure", "measure", corpus, start, *trained)
    if config.evaluation.benchmarks:
        add("evaluate", "evaluate", corpus, start, *dict.fromkeys((*trained, *final)))
    return tuple(nodes)


def measured(config: RunConfig) -> bool:
    """Whether held-out code is measured with and without thoughts at the end: when an arm thinks, or arms compare."""
    return len(config.run.arms) > 1 or any(arm in THINKING_ARMS for arm in config.run.arms)


def _add_arm(add, config: RunConfig, arm: str, corpus: str, start: str) -> str:
    """Append the stages of an arm; returns the name of the one whose checkpoint is the arm's."""
    if arm == "ntp":
        return add("ntp", "ntp", corpus, start, arm=arm)
    weights = start
    for r in range(1, config.run.rounds + 1):
        policy = weights
        if arm in ("ra3", "brite"):
            policy = add(f"{arm}-variational-{r}", "variational", corpus, weights, arm=arm, round=r)
        infused = add(f"{arm}-generate-{r}", "generate", corpus, policy, arm=arm, round=r)
        weights = add(f"{arm}-sft-{r}", "sft", corpus, infused, policy, weights, arm=arm, round=r)
    return weights


def find(config: RunConfig, kind: str, arm: str | None = None, round: int | None = None) -> Node:
    """The one stage that `--stage KIND [--arm ARM] [--round R]` means; the first arm and round 1 unless given.

    Raises UserError, with the stages of this run, when there is none.
    """
    nodes = graph(config)
    kinds = {node.kind for node in nodes}
    if kind in kinds and kind in SHARED and (arm is not None or round is not None):
        raise UserError(f"stage {kind} belongs to no arm and no round; leave --arm and --round out")
    wanted_arm = arm if arm is not None else next((n.arm for n in nodes if n.kind == kind), "")
    wanted_round = round if round is not None else next((n.round for n in nodes if n.kind == kind), 0)
    for node in nodes:
        if (node.kind, node.arm, node.round) == (kind, wanted_arm, wanted_round):
            return node
    raise UserError(
        f"this run has no stage {kind}" + (f" of arm {arm}" if arm else "") + (f" in round {round}" if round else "")
        + f"; its stages are {', '.join(n.name for n in nodes)}"
    )  # fmt: skip
