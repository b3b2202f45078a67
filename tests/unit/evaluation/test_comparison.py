"""Comparisons over seeds by hand, and what is refused since it would not compare."""

import json
import math

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.comparison import compared, comparison_table
from ra3_megatron.evaluation.held_out import FORMS


def figures(bare, thinking, **more):
    costs = zip(FORMS, (bare, thinking, thinking - 0.01), strict=True)
    ends = {f: {"nats_per_token": v, "low": v - 0.1, "high": v + 0.1, "tokens": 900} for f, v in costs}
    return {**ends, "think_rate": 0.25, "thought_tokens": 6.0, "duration": None, "gain": 0.1, **more}


def measured(ra3, ntp, base=2.0, tokens=(50_000, 49_500)):
    """`measured.json` of a seed: (bare, thinking) of the arms."""
    difference = {"low": -0.5, "high": 0.1, "p_value": 0.2}
    forms = (*FORMS, "thinking_against_bare")

    def pair(arm, against):
        return {f: {"against": against, "difference": arm[0] - 1, **difference} for f in forms}

    return {
        "base": figures(base, base + 0.5),
        "arms": {
            "ra3": figures(*ra3, flops=3e9, raw_tokens=tokens[0], seconds=9.0),
            "ntp": figures(*ntp, flops=1e9, raw_tokens=tokens[1], seconds=3.0),
        },
        "paired": {"ra3": pair(ra3, "ntp"), "ntp": pair(ntp, "base")},
        "snippets": 12,
        "what": "What it is.",
    }


SEEDS = {
    1: measured((1.5, 1.4), (1.6, 1.7), 2.0),
    2: measured((1.4, 1.2), (1.6, 1.7), 2.1),
    5: measured((1.6, 1.0), (1.9, 1.7), 2.2),
}


def entry(entries, **wanted):
    (found,) = [e for e in entries if all(e[k] == v for k, v in wanted.items())]
    return found


def test_over_seeds():
    """Differences of ra3 to ntp are -0.1, -0.2, -0.3: mean -0.2, error 0.1 / sqrt 3, t(2) quantile 4.302653."""
    content = compared(SEEDS, 1000, new_base=True)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert (content["arms"], content["seeds"]) == (["base", "ra3", "ntp"], [1, 2, 5])
    summary = entry(content["summary"], arm="ra3", metric="bare")
    assert (summary["mean"], summary["n"]) == (pytest.approx(1.5), 3)
    assert summary["high"] == pytest.approx(1.5 + 4.302653 * 0.1 / math.sqrt(3))
    paired = entry(content["paired"], arm="ra3", metric="bare")
    assert paired["against"] == "ntp"
    assert paired["difference"] == pytest.approx(-0.2)
    assert paired["low"] == pytest.approx(-0.2 - 4.302653 * 0.1 / math.sqrt(3))
    assert paired["p_value"] == pytest.approx(0.0742, abs=1e-4)
    # thoughts less the other's bare text: -0.2, -0.4, -0.9
    assert entry(content["paired"], arm="ra3", metric="thinking_against_bare")["difference"] == pytest.approx(-0.5)
    assert entry(content["paired"], arm="ntp", metric="bare")["against"] == "base"
    assert entry(content["paired"], arm="ntp", metric="bare")["difference"] == pytest.approx(1.7 - 2.1)
    assert entry(content["rows"], arm="ntp", seed=5)["bare"] == 1.9
    assert entry(content["rows"], arm="base", seed=2)["flops"] is None
    assert not [e for e in content["summary"] if e["metric"] == "duration"], "the mean of what nobody has"
    assert "3 seeds" in content["method"]
    assert "the base model too" in content["method"]


def test_one_seed_says_that_it_is_one():
    """An interval over documents taken for one over trainings."""
    content = compared({4: SEEDS[1]}, 1000, new_base=False)
    summary = entry(content["summary"], arm="ra3", metric="bare")
    assert (summary["mean"], summary["low"], summary["high"], summary["n"]) == (1.5, 1.4, 1.6, 1)
    assert entry(content["summary"], arm="ra3", metric="flops")["low"] is None
    assert entry(content["paired"], arm="ra3", metric="bare")["p_value"] == 0.2
    assert content["interval_over"] == "documents"
    assert content["method"].startswith("One seed")
    assert "over documents; seeds 4" in comparison_table(content)


def test_the_table():
    content = {
        **compared(SEEDS, 1000, new_base=True),
        "think_penalty": [{"price": 0.05, "think_rate": 0.4, "reward": -1.25}],
    }
    lines = comparison_table(content).splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("  ra3  ")] == [["ra3", "1.5000"]]
    assert "  price 0.05: think rate 40.0%, reward -1.2500" in lines
    (difference,) = [line for line in lines if "ra3 - ntp, bare" in line]
    assert "-0.2000 [-0.4484, +0.0484], p 0.0742" in difference


def test_other_tokens_are_refused():
    """An arm that saw more code won; held-out code that changed between two seeds."""
    longer = {1: measured((1.0, 1.0), (1.1, 1.1), tokens=(52_000, 50_000))}
    with pytest.raises(UserError, match=r"raw tokens \(ra3 52,000, ntp 50,000\), more than 1,000 apart"):
        compared(longer, 1000, new_base=True)
    assert compared(longer, 2000, new_base=True)["seeds"] == [1]
    other = measured((1.0, 1.0), (1.1, 1.1))
    other["arms"]["ntp"]["bare"]["tokens"] = 901
    with pytest.raises(UserError, match="ntp of seed 2 901"):
        compared({1: SEEDS[1], 2: other}, 1000, new_base=True)
