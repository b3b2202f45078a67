"""RLVR in seconds: tasks that a model of random weights passes now and then."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.e2e import small

STAGE = "01-rlvr"
TASKS = 12


def write_tasks(path: Path, count: int = TASKS, **changes: Any) -> Path:
    """The program is right as long as the answer stays in the comment it begins in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"task/{n}",
            "prompt": f"the number {n}",
            "starter": "def f(x):\n    return x  #",
            "entry_point": "f",
            "tests": ["assert f(1) == 1", "assert f(7) == 7"],
            "solution": "def f(x):\n    return x\n",
            **changes,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, base: Path, name: str = "run", **changes: dict[str, Any]) -> Path:
    """Six steps of four tasks, two at a time, from the last checkpoint of the run `base`; `changes` by section."""
    sections: dict[str, Any] = {
        "run": {"dir": str(folder / name), "seed": 7},
        "rlvr": {
            "start": str(base / "run"),
            "tasks": str(folder / "tasks.jsonl"),
            "steps": 6,
            "max_lag": 1,
            "minibatches": 2,
            "prompts_per_step": 4,
            "group_size": 4,
            "max_tokens": 24,
            "max_refills": 1,
            "overlong": "keep",
            "validation_tasks": 4,
            "validation_samples": 2,
            "eval_interval": 3,
            "checkpoint_interval": 1,
            "lr": 3e-3,
        },
        "latent": {"max_batch": 32},
        "judge": {"workers": 2},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    plain = small.config(folder, **sections)
    plain["model"].pop("architecture")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path
