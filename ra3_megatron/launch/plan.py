"""The jobs of a run: one per stage, an array for rationale generation, and what each waits for."""

from dataclasses import dataclass, replace

from ra3_megatron.config.run import RunConfig
from ra3_megatron.launch.settings import Settings
from ra3_megatron.stages.graph import ONE_PROCESS, Node, graph

SCRIPTS = {"variational": "rlvr.sh", "rlvr": "rlvr.sh", "generate": "generate.sh"}
"""Script of a kind of stage; `convert.sh` for those of one process, `midtrain.sh` for all others."""


@dataclass(frozen=True)
class JobSpec:
    """One job, or one array of them."""

    name: str
    """Unique in the run: the stage's folder, `-join` behind it for the end of a generation."""
    stage: str
    """Name of the stage's folder; its DONE ends the job's work."""
    script: str
    """File in `slurm/`."""
    arguments: tuple[str, ...]
    """What the script is given after the run's folder."""
    nodes: int
    """Nodes that work."""
    spares: int
    """Nodes that stand by."""
    processes: int
    """Processes per node."""
    gpus: int
    """GPUs per node."""
    array: int
    """Elements; 0 = no array."""
    after: tuple[str, ...]
    """Names of the jobs that must have succeeded."""

    @property
    def kind(self) -> str:
        """Kind of the stage."""
        return self.arguments[1]


def stage_folder(number: int, node: Node) -> str:
    """Folder of a stage in its run."""
    return f"{number:02d}-{node.name}"


def plan(config: RunConfig, settings: Settings) -> tuple[JobSpec, ...]:
    """All jobs of a run, each after those it waits for."""
    last: dict[str, str] = {}
    jobs: list[JobSpec] = []
    for number, node in enumerate(graph(config)):
        made = _jobs_of(stage_folder(number, node), node, settings, tuple(dict.fromkeys(last[n] for n in node.needs)))
        jobs += made
        last[node.name] = made[-1].name
    return tuple(jobs)


def _jobs_of(folder: str, node: Node, s: Settings, after: tuple[str, ...]) -> list[JobSpec]:
    arguments = ["--stage", node.kind]
    arguments += ["--arm", node.arm] if node.arm else []
    arguments += ["--round", str(node.round)] if node.round else []
    # One GPU, where there are any: many partitions refuse jobs without.
    gpus = min(1, s.gpus_per_node)
    single = JobSpec(folder, folder, "convert.sh", tuple(arguments), 1, 0, 1, gpus, 0, after)
    if node.kind in ONE_PROCESS:
        return [single]
    whole = replace(single, processes=s.processes, gpus=s.gpus_per_node)
    if node.kind == "generate":
        draw = replace(whole, script="generate.sh", nodes=s.array_nodes, array=s.array)
        return [draw, replace(single, name=f"{folder}-join", after=(folder,))]
    return [replace(whole, script=SCRIPTS.get(node.kind, "midtrain.sh"), nodes=s.nodes, spares=s.spares)]
