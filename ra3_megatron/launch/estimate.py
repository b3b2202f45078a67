"""How long a run will take and how many GPU-hours, from the FLOPs of its stages and a speed that was measured."""

import json
import math
from collections.abc import Mapping
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

THOUGHTS = 1.1
"""Tokens with thoughts, in multiples of those without."""

COUNTED = ("rlvr", "evaluate", "measure")
"""Kinds whose speed is what the formulas below give for the measured run, over its seconds: their result has no FLOPs,
or none that the plan could tell before. What a formula leaves out, such as prompts and the judge, is in the speed."""


@dataclass(frozen=True)
class Speed:
    """FLOP/s of one process, by kind of stage."""

    by_kind: dict[str, float]
    """What was measured; a kind that is not here has no estimate."""
    problems: dict[str, int]
    """Problems of each benchmark that was evaluated."""
    source: str
    """Where it was measured."""


def measured_speed(run: Path) -> Speed:
    """Speeds of the finished stages of a run. Raises UserError when there is none to measure by."""
    totals: dict[str, list[float]] = {}
    problems: dict[str, int] = {}
    saved = run / "config.yaml"
    config = load_config(saved) if saved.exists() else None
    for number, node in enumerate(graph(config) if config is not None else ()):
        assert config is not None
        stage = run / stage_folder(number, node)
        result = _json(stage / "DONE")
        if not result.get("seconds"):
            continue
        problems |= result.get("problems", {})
        amount = _amount_of(stage, node.kind, config, run, problems)
        if amount is None:
            continue
        # Seconds of a generation are those of all replicas together.
        processes = 1 if node.kind == "generate" else _processes(stage)
        sums = totals.setdefault(node.kind, [0.0, 0.0])
        sums[0] += amount
        sums[1] += float(result["seconds"]) * processes
    if not totals:
        raise UserError(f"{run} has no finished stage with FLOPs and seconds; give --measured a run that has")
    return Speed({kind: f / s for kind, (f, s) in totals.items()}, problems, str(run))


def _amount_of(stage: Path, kind: str, config: RunConfig, run: Path, problems: Mapping[str, int]) -> float | None:
    """FLOPs of a finished stage; none where they are not known."""
    if kind not in COUNTED:
        return float(_json(stage / "DONE").get("flops", 0)) or None
    if kind != "rlvr" and len(list(stage.glob("logs/[0-9]*"))) != 1:
        return None  # its seconds are those of the last attempt alone
    shape = next((_json(p) for p in sorted(run.glob("*/checkpoints/step_*/architecture.json"))), None)
    return None if shape is None else _counted_flops(config, Architecture.from_dict(shape), kind, problems)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _processes(stage: Path) -> int:
    """Processes that a stage ran with: its newest attempt's account, in older runs its newest checkpoint's layout.

    The layout leaves out replicas that only generate.
    """
    told = _json(stage / "logs" / "latest" / "environment.json").get("processes")
    if told is not None:
        return int(told)
    states = sorted(stage.glob("checkpoints/step_*/state.json"))
    layout = _json(states[-1]).get("layout", {}) if states else {}
    return math.prod(int(layout.get(name, 1)) for name in ("tensor", "pipeline", "context", "data"))


def planned_flops(
    config: RunConfig, a: Architecture, job: JobSpec, code_tokens: float | None, problems: Mapping[str, int]
) -> float | None:
    """FLOPs of a job; none where they cannot be told beforehand.

    `code_tokens` of the corpus, where they are known: generation goes over all of them. Thoughts are counted as a tenth
    more tokens; rollouts as one and a half passes over the final text, and two passes to score it. `problems` of each
    benchmark, as far as known.
    """
    t, kind, thoughts = config.train, job.kind, THOUGHTS
    if kind in COUNTED:
        return _counted_flops(config, a, kind, problems)
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


def _counted_flops(config: RunConfig, a: Architecture, kind: str, problems: Mapping[str, int]) -> float | None:
    """FLOPs of a stage of `COUNTED`, every answer counted with all the tokens it may have and no prompt.

    None when a benchmark's number of problems is not known.
    """
    t, r, e = config.train, config.rlvr, config.evaluation
    if kind == "rlvr":
        answers = r.steps * r.prompts_per_step * r.group_size
        measurements = 2 + (max(0, r.steps - 1) // r.eval_interval if r.eval_interval else 0)
        held_out = measurements * r.validation_tasks * r.validation_samples
        drawn = flops(a, (answers + held_out) * r.max_tokens, r.max_tokens / 2, training=False)
        return drawn + flops(a, answers * r.max_tokens, r.max_tokens / 2, training=True)
    kinds = ("sft", "ntp", "rlvr") if kind == "evaluate" else ("sft", "ntp")
    models = {node.name if node.kind == "rlvr" else node.arm for node in graph(config) if node.kind in kinds}
    # And the model that all began with, where it is no random one.
    brought = config.model.source or config.base.tokens or (config.rlvr.start and not config.run.arms)
    count = len(models) + bool(brought)
    if kind == "measure":
        length = float(config.data.snippet_tokens or t.seq_length)
        # A pass over the bare text; of every sample one and a half to draw it, and one over the result.
        passes = 1 + 2.5 * config.measure.samples * THOUGHTS
        return count * config.measure.snippets * passes * flops(a, length, length / 2, training=False)
    if not set(e.benchmarks) <= set(problems):
        return None
    asked = sum(min(problems[name], e.limit or problems[name]) for name in e.benchmarks)
    return count * flops(a, asked * e.samples * e.max_tokens, e.max_tokens / 2, training=False)


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
