"""From what was measured for every seed to a comparison of arms: means, intervals over seeds, paired differences."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.held_out import FORMS, known
from ra3_megatron.evaluation.statistics import mean_interval, paired_mean

BASE = "base"
"""The base model's name among the arms'."""

PAIRS = {**{form: (form, form) for form in FORMS}, "thinking_against_bare": ("thinking", "bare")}
"""Differences by name: the cost of an arm in the first form less that of the other in the second."""

FIGURES = (
    "think_rate",
    "thought_tokens",
    "duration",
    "discount_of_duration",
    "gain",
    "raw_tokens",
    "flops",
    "seconds",
)
"""What is compared besides costs, by its name in `measured.json`."""

_OVER_SEEDS = (
    "Means over {n} seeds with Student's 95 % intervals; differences are paired by seed, with a paired t test, "
    "two-sided and not corrected for the number of comparisons. Each seed trains every arm anew{base}; all are "
    "measured on the same held-out snippets."
)
_ONE_SEED = (
    "One seed: intervals and p-values are over held-out documents of this one training run and say nothing about "
    "another; give more seeds to compare the methods."
)


def compared(measured: Mapping[int, Mapping[str, Any]], tolerance: int, new_base: bool) -> dict[str, Any]:
    """Content of `compare.json`, without a sweep of prices, from the `measured.json` of every seed.

    `tolerance`: raw tokens that arms may differ by; `new_base`: the base model too is trained for every seed. Raises
    UserError where arms saw another number of raw tokens or were measured on other code: they do not compare.
    """
    seeds = list(measured)
    first = measured[seeds[0]]
    arms = ([BASE] if first["base"] else []) + list(first["arms"])
    refuse_other_code(measured)
    refuse_other_tokens(measured, tolerance)
    rows = [_row(measured[seed], arm, seed) for arm in arms for seed in seeds]
    one = len(seeds) == 1
    base = ", the base model too" if new_base else " from the same base model"
    return {
        "arms": arms,
        "seeds": seeds,
        "rows": rows,
        "summary": [entry for arm in arms for entry in _summary(measured, arm)],
        "paired": [entry for arm in first["paired"] for entry in _paired(measured, arm)],
        "snippets": first["snippets"],
        "interval_over": "documents" if one else "seeds",
        "method": f"{_ONE_SEED if one else _OVER_SEEDS.format(n=len(seeds), base=base)} {first['what']}",
    }


def refuse_other_code(measured: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise UserError unless every arm of every seed was measured on the same code tokens."""
    found = {
        f"{arm} of seed {seed}": figures["bare"]["tokens"]
        for seed, content in measured.items()
        for arm, figures in _models(content).items()
    }
    if len(set(found.values())) > 1:
        spelled = ", ".join(f"{who} {tokens:,}" for who, tokens in found.items())
        raise UserError(
            f"the seeds were measured on different code tokens ({spelled}); the corpus or measure.snippets changed "
            "between them: remove the older seed folders and run again"
        )


def refuse_other_tokens(measured: Mapping[int, Mapping[str, Any]], tolerance: int) -> None:
    """Raise UserError where two arms of a seed were trained on raw tokens that differ by more than `tolerance`."""
    for seed, content in measured.items():
        found = {arm: figures["raw_tokens"] for arm, figures in content["arms"].items()}
        if max(found.values()) - min(found.values()) > tolerance:
            spelled = ", ".join(f"{arm} {tokens:,}" for arm, tokens in found.items())
            raise UserError(
                f"seed {seed}: arms were trained on different numbers of raw tokens ({spelled}), more than "
                f"{tolerance:,} apart, and do not compare; set the length with train.tokens or train.epochs, and "
                "run.rounds to 1 unless all arms have rounds"
            )


def _models(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**({BASE: content["base"]} if content["base"] else {}), **content["arms"]}


def _row(content: Mapping[str, Any], arm: str, seed: int) -> dict[str, Any]:
    figures = _models(content)[arm]
    return {
        "arm": arm,
        "seed": seed,
        **{form: figures[form]["nats_per_token"] for form in FORMS},
        **{name: figures.get(name) for name in FIGURES},
    }


def _summary(measured: Mapping[int, Mapping[str, Any]], arm: str) -> Iterator[dict[str, Any]]:
    """Mean and interval of every figure of an arm, over the seeds that have it."""
    for metric in (*FORMS, *FIGURES):
        own = [_models(content)[arm].get(metric) for content in measured.values()]
        if metric in FORMS and len(own) == 1:
            ends = {"mean": own[0]["nats_per_token"], "low": own[0]["low"], "high": own[0]["high"]}
            yield {"arm": arm, "metric": metric, **ends, "n": 1}
            continue
        values = [v["nats_per_token"] if metric in FORMS else v for v in own if v is not None]
        if values:
            found = mean_interval(values)
            ends = {"mean": found.value, "low": known(found.low), "high": known(found.high)}
            yield {"arm": arm, "metric": metric, **ends, "n": len(values)}


def _paired(measured: Mapping[int, Mapping[str, Any]], arm: str) -> Iterator[dict[str, Any]]:
    """Differences of an arm to the one it is compared with, over seeds; of a single seed as it measured them."""
    first = next(iter(measured.values()))["paired"][arm]
    for metric, (form, other_form) in PAIRS.items():
        against = first[metric]["against"]
        head = {"arm": arm, "against": against, "metric": metric}
        if len(measured) == 1:
            yield {**head, **{k: v for k, v in first[metric].items() if k != "against"}, "n": 1}
            continue
        one = [content["arms"][arm][form]["nats_per_token"] for content in measured.values()]
        other = [_models(content)[against][other_form]["nats_per_token"] for content in measured.values()]
        found = paired_mean(one, other)
        ends = {"low": known(found.low), "high": known(found.high), "p_value": known(found.p_value)}
        yield {**head, "difference": found.value, **ends, "n": len(measured)}


# -------------------------------------------------------------------------------------------------- the table


def comparison_table(content: Mapping[str, Any]) -> str:
    """What the command prints at its end."""
    return "\n".join(_lines(content))


def _lines(content: Mapping[str, Any]) -> Iterator[str]:
    summary = {(entry["arm"], entry["metric"]): entry for entry in content["summary"]}
    seeds = ", ".join(map(str, content["seeds"]))
    yield ""
    yield f"nats per held-out code token, 95 % intervals over {content['interval_over']}; seeds {seeds}"
    yield f"  {'arm':<14}{'bare':<26}{'with own thoughts':<26}{'think rate':>10}{'raw tokens':>14}{'FLOPs':>10}"
    for arm in content["arms"]:

        def cell(metric: str, form: str, arm: str = arm) -> str:
            entry = summary.get((arm, metric))
            return "-" if entry is None else format(entry["mean"], form)

        costs = "".join(f"{_cost(summary[arm, form]):<26}" for form in ("bare", "thinking"))
        work = f"{cell('raw_tokens', ',.0f'):>14}{cell('flops', '.2e'):>10}"
        yield f"  {arm:<14}{costs}{cell('think_rate', '.1%'):>10}{work}"
    for entry in content["paired"]:
        if entry["metric"] == "multi_sample":
            continue
        name = {"thinking": "thoughts", "thinking_against_bare": "thoughts - bare"}.get(entry["metric"], "bare")
        pair = f"{entry['arm']} - {entry['against']}, {name}:"
        yield f"  {pair:<40} {entry['difference']:+.4f} {_ends(entry, '+.4f')}, p {_number(entry['p_value'], '.4f')}"
    for entry in content.get("think_penalty") or []:
        rate, reward = _number(entry["think_rate"], ".1%"), _number(entry["reward"], ".4f")
        yield f"  price {entry['price']:g}: think rate {rate}, reward {reward}"


def _cost(entry: Mapping[str, Any]) -> str:
    return f"{entry['mean']:.4f} {_ends(entry, '.4f')}"


def _ends(entry: Mapping[str, Any], form: str) -> str:
    return f"[{_number(entry['low'], form)}, {_number(entry['high'], form)}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
