"""The schema of `metrics.jsonl`: every field's name, unit and meaning, in one table."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError

METRICS_FILE = "metrics.jsonl"
WALL = "wall"
"""Key of the nested object that holds everything a clock or the machine's load has a say in."""


@dataclass(frozen=True)
class Metric:
    """One field of a record."""

    name: str
    """Key in the record."""
    unit: str
    """Unit, as written in the documentation."""
    meaning: str
    """What it is."""
    wall: bool = False
    """Whether it depends on the clock or the machine: it is kept apart, so that curves compare bit for bit."""


_FP8_KINDS = {
    "input": "inputs of linear layers",
    "weight": "weights",
    "gradient": "gradients of linear layers' outputs",
}

_FP8 = (
    *(
        Metric(f"fp8_{kind}_amax_{quarter}", "1", f"largest size of {what}, quarter {quarter} of the layers")
        for kind, what in _FP8_KINDS.items()
        for quarter in (1, 2, 3, 4)
    ),
    *(
        Metric(f"fp8_{kind}_scale_{quarter}", "1", f"smallest factor of {what} before rounding, in that quarter")
        for kind, what in _FP8_KINDS.items()
        for quarter in (1, 2, 3, 4)
    ),
    *(
        Metric(f"fp8_{kind}_{flow}flow", "fraction", f"{what}: values {meaning}")
        for kind, what in _FP8_KINDS.items()
        for flow, meaning in (("over", "beyond the largest number"), ("under", "not zero that round to zero"))
    ),
    Metric("fp8_nonfinite", "values", "NaN and infinite values among all of these"),
    Metric("fp8_probe_loss", "nats per token", "loss of the step's first micro-batch in FP8, before the update"),
    Metric("fp8_probe_bf16_loss", "nats per token", "the same in BF16, same weights"),
    Metric("fp8_probe_difference", "fraction", "difference of the two losses over the second"),
    Metric("fp8_probe_gap", "nats", "mean |difference| of a token's log-probability in FP8 and in BF16"),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "nats per token", "training loss of the step, over all counted tokens of the global batch"),
        Metric("validation_loss", "nats per token", "loss over the validation windows with the weights after the step"),
        Metric("lr", "1", "learning rate the step was taken with"),
        Metric("grad_norm", "1", "global L2 norm of the gradient before clipping"),
        Metric("tokens", "tokens", "tokens of the windows trained on so far, padding included"),
        Metric("loss_tokens", "tokens", "tokens that counted in the loss of this step"),
        Metric("samples", "sequences", "packed windows trained on so far"),
        Metric("epoch", "passes", "passes over the packed corpus so far"),
        Metric("skipped_steps", "steps", "steps skipped so far for a NaN or infinite loss or gradient"),
        Metric("code_loss", "nats per token", "training loss on code tokens alone, thoughts left out"),
        Metric("validation_code_loss", "nats per token", "validation loss on code tokens, given the thoughts"),
        Metric("bare_code_loss", "nats per token", "validation loss on code tokens of the text without any thought"),
        Metric("reward", "nats per token (`sum`: per line)", "mean reward of a line, prices of thoughts taken off"),
        Metric("reward_error", "as reward", "standard error of `reward` over the snippets of the step"),
        Metric("reward_over_bare", "as reward", "`reward` less what the same lines earn without any thought"),
        Metric("reward_over_bare_error", "as reward", "standard error of `reward_over_bare`, over snippets"),
        Metric("probe_reward", "as reward", "mean reward of the probe: the same snippets and random numbers each time"),
        Metric("probe_rise", "as reward", "rise of the probe's reward since before the first step"),
        Metric("probe_rise_error", "as reward", "standard error of `probe_rise`, over snippets in pairs"),
        Metric("think_rate", "fraction", "decisions that drew a thought"),
        Metric("thought_tokens", "tokens", "mean length of a thought, opening and end included"),
        Metric("duration", "lines", "mean duration tau of a latent, from one thought to the next (Kaplan-Meier)"),
        Metric("discount_of_duration", "1", "gamma-bar = mean gamma^tau with gamma = variational.figure_discount"),
        Metric("gain", "nats per token", "mean of l(line, thought) - l(line, act) over lines with a thought"),
        Metric("gain_error", "nats per token", "standard error of `gain`"),
        Metric("elbo", "nats per token", "temporal bound (with a constant price: the objective) over code tokens"),
        Metric("elbo_multi_sample", "nats per token", "importance-weighted bound of a group over code tokens"),
        Metric("decision_perplexity", "1", "effective number of outcomes of a decision, 1 to 2"),
        Metric("line_nats", "nats", "mean -l of a line, the log of the effective number of lines"),
        Metric("calibration_error", "1", "expected error of p_think as forecast of gain above price"),
        Metric("calibration_brier", "1", "mean squared error of the same forecast"),
        Metric("rollout_gap", "nats", "largest |log-prob when sampled - log-prob when trained| of an action at lag 0"),
        Metric("policy_loss", "1", "policy-gradient component of the loss"),
        Metric("clipped", "fraction", "actions whose ratio was clipped or weight truncated"),
        Metric("lag", "updates", "weights versions between the rollouts and this update"),
        Metric("actions", "actions", "decisions and sampled tokens in the loss of this step"),
        Metric("truncated_thoughts", "fraction", "thoughts that were ended by force"),
        Metric("not_offered", "fraction", "decisions without room for a thought"),
        Metric("broken_programs", "rollouts", "rollouts dropped since their thoughts change the program, so far"),
        Metric("answer_reward", "1", "mean reward of an answer to a task (RLVR), over all answers drawn for the step"),
        Metric("answer_reward_spread", "1", "standard deviation of that reward over the answers"),
        Metric("pass_rate", "fraction", "answers that passed every test"),
        Metric(
            "tests_passed",
            "fraction",
            "mean share of tests an answer passed (up to the first that fails unless rlvr.reward is fraction)",
        ),
        Metric("groups", "groups", "groups of answers drawn for the step, refills included"),
        Metric("groups_used", "groups", "groups that the step learned from"),
        Metric("groups_flat", "groups", "groups left out since all their answers earned the same"),
        Metric("groups_all_right", "fraction", "groups whose answers all passed"),
        Metric("groups_all_wrong", "fraction", "groups of which no answer passed"),
        Metric("refilled", "groups", "places that got another task, so far"),
        Metric("answers", "answers", "judged answers of the step"),
        Metric("answer_tokens", "tokens", "mean length of an answer, its ending included"),
        Metric("answer_nats", "nats per token", "mean -log-prob of the drawn tokens: an estimate of the entropy"),
        Metric("truncated_answers", "fraction", "answers cut at rlvr.max_tokens"),
        Metric("ended_by_id", "fraction", "answers that ended with the end-of-text token"),
        Metric("ended_by_text", "fraction", "answers that ended with a text of rlvr.stop"),
        Metric("verdict_passed", "answers", "programs that passed every test"),
        Metric("verdict_wrong", "answers", "programs with a wrong answer"),
        Metric("verdict_exception", "answers", "programs that raised, or are no Python"),
        Metric("verdict_missing", "answers", "programs that lack the function that is called"),
        Metric("verdict_cpu_limit", "answers", "programs that took too much processor time"),
        Metric("verdict_wall_limit", "answers", "programs that slept or waited too long"),
        Metric("verdict_memory", "answers", "programs that took too much memory"),
        Metric("verdict_output", "answers", "programs that printed or returned too much"),
        Metric("verdict_crashed", "answers", "programs that ended by a signal or an exit"),
        Metric("verdict_unsafe", "answers", "programs that could not be judged apart from their tests"),
        Metric("verdict_lost", "answers", "answers left out: the judge's machine failed, after retries"),
        Metric("lost_answers", "answers", "the same, so far"),
        Metric("reference_kl", "nats per token", "divergence from the weights the stage started from, as estimated"),
        Metric(
            "validation_pass_rate",
            "fraction",
            "held-out tasks: answers that passed, mean over tasks; the same random numbers each time",
        ),
        Metric("validation_pass_error", "fraction", "standard error of that rate, over tasks"),
        Metric("validation_answer_tokens", "tokens", "mean length of an answer to a held-out task"),
        Metric("rollout_tokens", "tokens", "tokens fed through the model by rollouts so far, mean of the replicas"),
        Metric("forward_passes", "passes", "forward passes of rollouts so far, mean of the replicas"),
        *_FP8,
        Metric("rollout_seconds", "seconds", "time spent on the rollouts of the step", wall=True),
        Metric("judge_seconds", "seconds", "time spent waiting for verdicts after the last answer", wall=True),
        Metric("trainer_idle_seconds", "seconds", "time training replicas waited for those that generate", wall=True),
        Metric("generator_idle_seconds", "seconds", "time generating replicas waited before that draw", wall=True),
        Metric("transfer_seconds", "seconds", "time the weights took to those that generate", wall=True),
        Metric("score_seconds", "seconds", "time spent on log-probs of other models", wall=True),
        Metric("update_seconds", "seconds", "time spent on the update", wall=True),
        Metric("time", "seconds since 1970", "when the record was written", wall=True),
        Metric("step_seconds", "seconds", "mean duration of a step since the previous record", wall=True),
        Metric("tokens_per_second", "tokens/s", "tokens trained on per second, all processes together", wall=True),
        Metric("mfu", "fraction", "model FLOP/s over the devices' peak", wall=True),
        Metric("peak_memory_bytes", "bytes", "largest memory of a device (on a CPU: of a process) so far", wall=True),
    )
}


def encode_record(step: int, values: Mapping[str, float | int]) -> str:
    """One line of `metrics.jsonl`, without the newline.

    Floats are written with `repr`, which reads back to the same bits; NaN and infinities as the strings "nan", "inf",
    "-inf", since JSON has none. Raises ValueError for a name that `METRICS` lacks, TypeError for what is no number.
    """
    plain: dict[str, Any] = {"step": step}
    wall: dict[str, Any] = {}
    for name, value in values.items():
        if name not in METRICS:
            raise ValueError(f"metric '{name}' is not in the schema; add it to METRICS in {__name__}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"metric '{name}' is a {type(value).__name__}; give a Python int or float")
        encoded = value if math.isfinite(value) else str(float(value))
        (wall if METRICS[name].wall else plain)[name] = encoded
    if wall:
        plain[WALL] = wall
    return json.dumps(plain, allow_nan=False)


def decode_record(line: str) -> dict[str, Any]:
    """Inverse of `encode_record`: numbers by name, the clock's under `wall`. Raises ValueError for anything else."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("not an object with an integer 'step'")
    flat = {name: _number(value) for name, value in record.items() if name != WALL}
    wall = {name: _number(value) for name, value in record.get(WALL, {}).items()}
    return {**flat, WALL: wall} if wall else flat


def _number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    return float(value) if isinstance(value, str) else value


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, in order; a torn last line, which a crash leaves, is left out.

    Raises UserError for a damaged line anywhere else.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append(decode_record(line.decode("utf-8")))
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} is not a metric record ({error}); restore the file or remove the line"
            ) from None
    return records


def curve(path: Path | str) -> list[dict[str, Any]]:
    """Records without what depends on the clock: equal for two runs that trained alike, bit for bit."""
    return [{k: v for k, v in record.items() if k != WALL} for record in read_metrics(path)]


def schema_markdown() -> str:
    """The table of `docs/metrics.md`."""
    rows = ["| field | unit | meaning |", "|---|---|---|", "| `step` | steps | optimizer steps done; never decreases |"]
    rows += [
        f"| `{WALL + '.' if metric.wall else ''}{metric.name}` | {metric.unit} | {metric.meaning} |"
        for metric in METRICS.values()
    ]
    return "\n".join(rows) + "\n"
