"""How long a run will take and how many GPU-hours, from the FLOPs of its stages and a speed that was measured."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import flops
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import RunConfig, load_config
from ra3_megatron.launch.plan import JobSpec, stage_folder
from ra3_megatron.stages.graph import graph

TRAINING = ("base", "ntp", "sft")


@dataclass(frozen=True)
class Speed:
    """FLOP/s of one process, by kind of stage."""

    by_kind: dict[str, float]
    """What was measured; a kind that is not here has no estimate."""
    source: str
    """Where it was measured."""


def measured_speed(run: Path) -> Speed:
    """Speeds of the finished stages of a run. Raises UserError when there is none to measure by."""
    totals: dict[str, list[float]] = {}
    saved = run / "config.yaml"
    nodes = graph(load_config(saved)) if saved.exists() else ()
    for number, node in enumerate(nodes):
        stage = run / stage_folder(number, node)
        result = _json(stage / "DONE")
        if not result.get("flops") or not result.get("seconds"):
            continue
        # Seconds of a generation are those of all replicas together.
        processes = 1 if node.kind == "generate" else _processes(stage)
        sums = totals.setdefault(node.kind, [0.0, 0.0])
        sums[0] += float(result["flops"])
        sums[1] += float(result["seconds"]) * processes
    if not totals:
        raise UserError(f"{run} has no finished stage with FLOPs and seconds; give --measured a run that has")
    return Speed({kind: f / s for kind, (f, s) in totals.items()}, str(run))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _processes(stage: Path) -> int:
    """Processes that a stage ran with: the layout its newest checkpoint names."""
    states = sorted(stage.glob("checkpoints/step_*/state.json"))
    layout = _json(states[-1]).get("layout", {}) if states else {}
    return math.prod(int(layout.get(name, 1)) for name in ("tensor", "pipeline", "context", "data"))


def planned_flops(config: RunConfig, a: Architecture, job: JobSpec, code_tokens: float | None) -> float | None:
    """FLOPs of a job; none where they cannot be told beforehand.

    `code_tokens` of the corpus, where they are known: generation goes over all of them. Thoughts are counted as a tenth
    more tokens; rollouts as one and a half passes over the final text, and two passes to score it.
    """
    t, kind, thoughts = config.train, job.kind, 1.1
    if kind in TRAINING:
        tokens = float(config.base.tokens) if kind == "base" else _trained_tokens(config)
        if tokens is None:
            return None
        return flops(a, tokens * (thoughts if kind == "sft" else 1.0), t.seq_length / 2, training=True)
    if kind == "variational":
        v, length = config.variational, float(config.data.snippet_tokens or t.seq_length)
        tokens = v.steps * v.snippets_per_step * v.group_size * length * thoughts
        once = flops(a, tokens, length / 2, training=False)
        return 1.5 * once + 2 * once + flops(a, tokens, length / 2, training=True)
    if kind == "generate" and code_tokens:
        length = float(config.data.snippet_tokens or t.seq_length)
        samples = config.generate.bolt_samples if "bolt" in job.arguments else 1
        return 1.5 * samples * flops(a, code_tokens * thoughts, length / 2, training=False)
    return None


def _trained_tokens(config: RunConfig) -> float | None:
    t = config.train
    if t.tokens is not None:
        return float(t.tokens)
    return None if t.steps is None else float(t.steps * t.global_batch_size * t.seq_length)


def corpus_tokens(run: Path) -> float | None:
    """Tokens of the prepared corpus; none before it is there."""
    counts = [_json(p / "DONE").get("counts", {}) for p in run.glob("*-prepare") if is_done(p)]
    return float(counts[0]["tokens"]) if counts and "tokens" in counts[0] else None


def job_hours(job: JobSpec, amount: float | None, speed: Speed) -> float | None:
    """Hours of a job on its nodes (of an array: all elements at once); none without a figure."""
    rate = speed.by_kind.get(job.kind)
    if amount is None or rate is None or job.script == "convert.sh":
        return None
    return amount / rate / (job.nodes * job.processes * max(1, job.array)) / 3600
