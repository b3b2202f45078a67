"""Folders as runs leave them, with made-up but plausible figures: what the report is tested and looked at with."""

import ast
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ra3_megatron.config.files import write_done
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.sections import ReportConfig
from ra3_megatron.report.environment import write_environment
from ra3_megatron.report.metrics import MetricsLog

HOSTILE = "</script><script>document.title='broken out'</script><img src=//evil.example/x onerror=alert(1)>\u2028 & <b>"
"""A thought that would end the script element it lies in, load a picture and run a script."""

WORDS = (
    "check the input", "start with the empty case", "collect the results", "walk over all entries", "undo the escape",
    "remember where we were", "fall back to the default", "keep the order", "stop at the first match", "return early",
)  # fmt: skip


def write_run(run: Path, steps: int = 40, snippets: int = 6) -> Path:
    """A finished run of three arms in `run`, with rationales of the E-step and of the measurement."""
    run.mkdir(parents=True)
    config_from_dict(
        {"run": {"arms": ["ra3", "self_comment", "ntp"]}, "data": {"tokenizer": {"kind": "train_bpe"}}}
    ).save(run / "config.yaml")
    write_corpus_report(run / "01-prepare")
    write_estep(run / "02-ra3-variational-1", steps, snippets)
    write_sft(run / "04-ra3-sft-1", steps, thoughts=True, final=1.31)
    write_sft(run / "06-self_comment-sft-1", steps, thoughts=True, final=1.39)
    write_sft(run / "07-ntp", steps, thoughts=False, final=1.36)
    write_measure(run / "08-measure", snippets)
    return run


def write_corpus_report(stage: Path) -> None:
    """Counts that preparation leaves."""
    (stage / "data" / "corpus").mkdir(parents=True)
    counts = {"read": 1200, "kept": 1058, "dropped": {"syntax": {"count": 12, "meaning": "is no Python"}}}
    (stage / "data" / "corpus" / "report.json").write_text(json.dumps(counts))
    write_done(stage)


def write_estep(stage: Path, steps: int, snippets: int) -> None:
    """An E-step: its metrics, its rationales before and after, its DONE."""
    luck = random.Random(stage.name)
    tokens = passes = 0
    with MetricsLog(stage, ReportConfig(tensorboard=False), is_writer=True) as log:
        for step in range(1, steps + 1):
            done = 1 - math.exp(-step / 12)
            tokens, passes = tokens + 21_000 + luck.randrange(2_000), passes + 300 + luck.randrange(30)
            reward = -0.92 + 0.11 * done + luck.gauss(0, 0.008)
            log.log(
                step, reward=reward, reward_error=0.012, think_rate=0.62 - 0.27 * done, thought_tokens=9.5 - 3.8 * done,
                reward_over_bare=-0.1 + 0.14 * done, reward_over_bare_error=0.01,
                probe_rise=0.1 * done, probe_rise_error=0.02 * done,
                duration=1.6 + 1.3 * done, discount_of_duration=0.83 - 0.09 * done, gain=-0.06 + 0.19 * done,
                gain_error=0.02, elbo=reward - 0.03, elbo_multi_sample=reward + 0.04,
                decision_perplexity=1.9 - 0.3 * done, line_nats=9.1 - done, calibration_error=0.3 - 0.2 * done,
                calibration_brier=0.29 - 0.1 * done, rollout_gap=abs(luck.gauss(0, 2e-6)), policy_loss=luck.gauss(0, 1),
                clipped=0.01 + 0.01 * luck.random(), lag=0, actions=2600 + luck.randrange(300), truncated_thoughts=0.02,
                not_offered=0.04, broken_programs=step // 20, rollout_tokens=tokens, forward_passes=passes, lr=1e-4,
                grad_norm=0.7 + luck.random(), rollout_seconds=4 + luck.random(), score_seconds=1.1,
                update_seconds=2 + 0.2 * luck.random(), step_seconds=7.5, peak_memory_bytes=3.1e9,
            )  # fmt: skip
    write_lines(stage / "data" / "rationales-before.jsonl", rollouts(snippets, think=0.6, skill=-0.05, seed=1))
    write_lines(stage / "data" / "rationales-after.jsonl", rollouts(snippets, think=0.35, skill=0.12, seed=2))
    result = {
        "checkpoint": f"{stage.name}/checkpoints/step_{steps}", "step": steps, "reward_first": -0.9135,
        "reward_last": -0.8122, "probe_reward_before": -0.934, "probe_reward_after": -0.828, "probe_rise_error": 0.021,
        "stopped": "flat", "flops": 3.21e15, "rollout_tokens": tokens,
    }  # fmt: skip
    write_done(stage, json.dumps(result))


def write_sft(stage: Path, steps: int, thoughts: bool, final: float) -> None:
    """A supervised stage: its metrics and its DONE."""
    luck = random.Random(stage.name)

    def measure(log: MetricsLog, step: int) -> None:
        loss = final + 0.25 * math.exp(-step / 15)
        given = {"validation_code_loss": loss - 0.03, "bare_code_loss": loss} if thoughts else {}
        log.log(step, validation_loss=loss + (0.2 if thoughts else 0.0), **given)

    with MetricsLog(stage, ReportConfig(tensorboard=False), is_writer=True) as log:
        measure(log, 0)
        for step in range(1, steps + 1):
            loss = final + 0.3 * math.exp(-step / 15) + luck.gauss(0, 0.02)
            code = {"code_loss": loss} if thoughts else {}
            log.log(
                step, loss=loss + (0.2 if thoughts else 0.0), **code, lr=3e-4, grad_norm=luck.random() + 0.5,
                tokens=step * 32768, epoch=step / steps, tokens_per_second=21_000 + luck.randrange(900),
            )  # fmt: skip
            if step % 8 == 0:
                measure(log, step)
    write_environment(stage / "logs" / "0001")
    write_done(stage, json.dumps({"checkpoint": "checkpoints/step_40", "step": steps}))


def write_measure(stage: Path, snippets: int) -> None:
    """What `measure` leaves: figures of all arms, and their rollouts on held-out snippets."""
    write_lines(
        stage / "data" / "rationales-base.jsonl", rollouts(snippets, think=0.5, skill=-0.02, seed=3, learned=False)
    )
    write_lines(
        stage / "data" / "rationales-ra3.jsonl", rollouts(snippets, think=0.3, skill=0.15, seed=4, learned=False)
    )
    (stage / "measured.json").write_text(json.dumps(measured()))
    write_done(stage)


def measured() -> dict[str, Any]:
    """Content of a `measured.json`: ra3 beats ntp, self_comment shows nothing."""

    def arm(bare: float, thinking: float, rate: float, gain: float, **more: Any) -> dict[str, Any]:
        forms = {"bare": bare, "thinking": thinking, "multi_sample": thinking - 0.011}
        figures = {
            form: {"nats_per_token": value, "low": value - 0.02, "high": value + 0.021, "tokens": 51_200}
            for form, value in forms.items()
        }
        return {**figures, "think_rate": rate, "gain": gain, "gain_low": gain - 0.03, "gain_high": gain + 0.03, **more}

    def pair(difference: float, half: float, p: float) -> dict[str, Any]:
        ends = {"low": difference - half, "high": difference + half}
        return {"against": "ntp", "difference": difference, "p_value": p, **ends}

    trained = {"raw_tokens": 1_310_720, "seconds": 2210.0, "thinks": True}
    return {
        "snippets": 128,
        "documents": 97,
        "method": "95 % intervals: bootstrap over documents. p-values: paired sign flips over documents.",
        "base": arm(1.4412, 1.4521, 0.51, -0.06),
        "arms": {
            "ra3": arm(1.3142, 1.2871, 0.34, 0.13, flops=4.4e15, **trained),
            "self_comment": arm(1.3871, 1.3912, 0.5, -0.02, flops=2.9e15, **trained),
            "ntp": arm(1.3622, 1.3655, 0.002, 0.01, flops=1.2e15, **trained),
        },
        "paired": {
            "ra3": {"bare": pair(-0.048, 0.013, 0.0002), "thinking_against_bare": pair(-0.0751, 0.02, 0.0001)},
            "self_comment": {"bare": pair(0.0049, 0.0155, 0.53), "thinking_against_bare": pair(0.03, 0.01, 0.004)},
        },
    }


def comparison() -> dict[str, Any]:
    """Content of a `compare.json` with a sweep of the price: ra3 beats ntp by the bare code, not with thoughts."""
    luck = random.Random(5)
    arms = {"ra3": (1.311, 1.290, 0.34), "ntp": (1.359, 1.362, 0.002)}
    work = {"raw_tokens": 1_310_720, "flops": 4.4e15, "seconds": 2210.0}
    rows, summary = [], []
    for arm, (bare, thinking, rate) in arms.items():
        figures = {"bare": bare, "thinking": thinking, "think_rate": rate}
        for seed in (1, 2, 3):
            drawn = {name: value * luck.gauss(1, 0.003) for name, value in figures.items()}
            rows.append({"arm": arm, "seed": seed, **drawn, **work})
        ends = {name: (value * 0.995, value * 1.005) for name, value in figures.items()}
        summary += [
            {"arm": arm, "metric": name, "mean": value, "low": ends[name][0], "high": ends[name][1], "n": 3}
            for name, value in figures.items()
        ]
        summary += [{"arm": arm, "metric": m, "mean": v, "low": v, "high": v, "n": 3} for m, v in work.items()]
    pair = {"arm": "ra3", "against": "ntp", "n": 3}
    sweep = ((0.2, 0.03, -0.85), (0.01, 0.93, -0.84), (0.05, 0.36, -0.81))
    return {
        "arms": list(arms),
        "seeds": [1, 2, 3],
        "rows": rows,
        "summary": summary,
        "paired": [
            {**pair, "metric": "bare", "difference": -0.048, "low": -0.062, "high": -0.034, "p_value": 0.0004},
            {
                **pair,
                "metric": "thinking_against_bare",
                "difference": -0.01,
                "low": -0.03,
                "high": 0.01,
                "p_value": 0.2,
            },
        ],
        "snippets": 128,
        "interval_over": "seeds",
        "method": "Means over 3 seeds with Student's 95 % intervals; differences are paired by seed.",
        "think_penalty": [{"price": price, "think_rate": rate, "reward": reward} for price, rate, reward in sweep],
    }


def write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """A rationale file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def rollouts(
    snippets: int, think: float, skill: float, seed: int, members: int = 2, learned: bool = True
) -> Iterator[dict[str, Any]]:
    """Rollouts on functions of `textwrap` and its neighbours; the first snippet's first line has a hostile thought."""
    luck = random.Random(seed)
    for number, (name, lines) in enumerate(_functions(snippets)):
        for member in range(members):
            entries = []
            for at, text in enumerate(lines):
                count = max(1, len(text) // 4)
                thinks = luck.random() < think or (number == 0 and at == 1)
                words = HOSTILE if number == 0 and at == 1 else f"{luck.choice(WORDS)}, {luck.choice(WORDS)}"
                gain = luck.gauss(skill, 0.25)
                entries.append(
                    {
                        "text": text, "tokens": count, "log_prob": -count * luck.uniform(0.05, 2.0),
                        "thought": words if thinks else None, "thought_tokens": 6 if thinks else 0,
                        "p_think": min(0.99, max(0.01, luck.gauss(think, 0.2))), "gain": gain if thinks else None,
                        "advantage": luck.gauss(skill, 0.1) if learned else None,
                    }
                )  # fmt: skip
            reward = sum(e["log_prob"] / e["tokens"] for e in entries) / len(entries)
            yield {"snippet": number, "name": name, "member": member, "reward": reward, "lines": entries}


def _functions(count: int) -> list[tuple[str, list[str]]]:
    """Name and lines of the first `count` longer functions of some modules of the standard library."""
    found: list[tuple[str, list[str]]] = []
    for module in ("textwrap", "heapq", "bisect", "shlex", "fnmatch", "glob", "calendar", "argparse"):
        source = Path(ast.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 3:
                lines = source.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
                found.append((f"{module}.py: {node.name}", lines))
    return found[:count]
