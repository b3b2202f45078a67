"""Tokens per second of whole E-steps: rollouts, scoring and update, as `ra3 profile --stage variational` times them.

    python benchmarks/gpu_estep.py [--shape qwen3-0.6b] [--settings te-bf16,fp8-tensorwise] [--snippets 64] [--group 8]

Random weights of that shape, snippets of the Python library, a tokenizer trained on it. A step's tokens are those fed
by rollouts plus those scored plus those trained on, padding included. The profile of every setting is kept in --out.
"""

import json
import tempfile
from pathlib import Path

from gpu_common import SETTINGS, SHAPES, Results, can_run, chosen, parser_of, why_not

from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.stages.profile import Plan, Request, run_profile


def configuration(setting: str, shape: str, seq: int, snippets: int, group: int, folder: Path) -> RunConfig:
    """A run whose E-step is profiled."""
    a = SHAPES[shape]
    return config_from_dict(
        {
            "run": {"dir": str(folder / "run"), "arms": ["ra3"]},
            "model": {**SETTINGS[setting], "architecture": a.to_dict()},
            "data": {
                "corpus": {"kind": "python_stdlib", "limit": 60},
                "tokenizer": {"kind": "train_bpe", "vocab_size": min(a.vocab_size, 4096)},
                "snippet_tokens": min(400, seq // 2), "validation_fraction": 0.1, "workers": 1,
            },
            "base": {"tokens": 1024},
            "latent": {"max_latent_tokens": 16, "max_batch": snippets * group},
            "variational": {"steps": 10, "snippets_per_step": snippets, "group_size": group},
            "train": {"seq_length": seq, "steps": 10, "micro_batch_size": 1, "global_batch_size": 1},
        }
    )  # fmt: skip


def report(results: Results, name: str, found: dict) -> None:
    """Figures out of a profile."""
    work, step = found["work_per_step"], found["step_seconds"]
    tokens = work["trained"] + work["scored"] + work["rolled_out"]
    phases = {p["name"]: p["seconds"] for p in found["phases"] if not p["within"]}
    note = ", ".join(f"{phase} {s / step:.0%}" for phase, s in phases.items() if s > 0.01 * step)
    results.add(f"{name}: E-step", tokens / step, "tokens/s", note=f"{step:.3g} s a step: {note}")
    results.add(f"{name}: E-step, MFU of the measured product", found["utilisation"]["of_measured"], "")
    floors = {f["phase"]: f["seconds"] for f in found["floors"]}
    if floors.get("rollout"):
        results.add(f"{name}: rollouts over their floor of the profile", phases["rollout"] / floors["rollout"], "x")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=SHAPES)
    parser.add_argument("--settings", default="te-bf16,fp8-tensorwise")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--snippets", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder that the profiles are kept in")
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.seq, options.snippets, options.group, options.steps = "tiny", 128, 2, 2, 1
        options.settings = "local-fp32"
    results = Results("e-step", options.results)
    if not can_run(results, options.tiny):
        return
    for setting in chosen(options.settings, list(SETTINGS)):
        name = f"{options.shape} {setting}"
        if why := why_not(setting):
            results.missing(name, why)
            continue
        with results.case(name), tempfile.TemporaryDirectory() as temporary:
            kept = (options.out or Path(temporary)) / f"profile-{options.shape}-{setting}"
            config = configuration(
                setting, options.shape, options.seq, options.snippets, options.group, Path(temporary)
            )
            request = Request(stage="variational", plan=Plan(1, options.steps, 1), save=False, out=kept)
            found = json.loads((run_profile(config, request) / "profile.json").read_text())
            report(results, name, found)


if __name__ == "__main__":
    main()
