"""What the GPU benchmarks share: shapes, results on disk as they come, synthetic batches, engines of every kind."""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model, choose_layers
from ra3_megatron.parallel.groups import Parallel, seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine

SHAPES = {
    "tiny": Architecture("qwen2", 2, 64, 4, 2, 16, 128, 512, True, True, max_positions=2048),
    "qwen2.5-1.5b": Architecture(
        "qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, True, rope_base=1e6, max_positions=131072
    ),
    "qwen3-0.6b": Architecture(
        "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True, False, True, rope_base=1e6, max_positions=40960
    ),
    "llama-3.2-1b": Architecture("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, False, max_positions=131072),
    "qwen2.5-7b": Architecture(
        "qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, True, rope_base=1e6, max_positions=131072
    ),
    "llama-3.1-8b": Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, False, max_positions=131072),
}
"""Shapes with random weights: speed and memory do not depend on the numbers."""

SETTINGS: dict[str, dict[str, Any]] = {
    "local-fp32": {"precision": "fp32", "layers": "local"},
    "local-bf16": {"precision": "bf16", "layers": "local"},
    "te-bf16": {"precision": "bf16", "layers": "te"},
    "fp8-delayed": {"precision": "fp8", "fp8_recipe": "delayed"},
    "fp8-tensorwise": {"precision": "fp8", "fp8_recipe": "tensorwise"},
    "fp8-blockwise": {"precision": "fp8", "fp8_recipe": "blockwise"},
    "fp8-mxfp8": {"precision": "fp8", "fp8_recipe": "mxfp8"},
}
"""Fields of `model` by the names that the benchmarks use."""


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none."""

    part: str
    """Benchmark."""
    case: str
    """What was measured."""
    value: float | None
    """The figure; none = NOT RUN or FAILED, `note` says why."""
    unit: str
    target: str = ""
    """Such as `>= 0.5`; empty = none."""
    met: bool | None = None
    note: str = ""


class Results:
    """Figures of one benchmark, on disk as soon as they are known: whoever is stopped loses only what is under way."""

    def __init__(self, part: str, path: Path | None) -> None:
        self.part, self.path, self.rows = part, path, list[Row]()

    def add(
        self, case: str, value: float, unit: str, least: float | None = None, most: float | None = None, note: str = ""
    ) -> None:
        """A figure; `least` or `most` is its target."""
        target, met = "", None
        if least is not None:
            target, met = f">= {least:g}", value >= least
        elif most is not None:
            target, met = f"<= {most:g}", value <= most
        self._keep(Row(self.part, case, value, unit, target, met, note))

    def missing(self, case: str, why: str) -> None:
        """What was not measured, and why: `NOT RUN: no GPU`, `FAILED: ...`."""
        self._keep(Row(self.part, case, None, "", note=why))

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        said = row.note if row.value is None else f"{row.value:.4g} {row.unit}"
        verdict = "" if row.met is None else f" (target {row.target}: {'met' if row.met else 'MISSED'})"
        extra = f"  [{row.note}]" if row.note and row.value is not None else ""
        print(f"{row.part}  {row.case}: {said}{verdict}{extra}", flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(json.dumps([asdict(r) for r in self.rows], indent=1))
            os.replace(temporary, self.path)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A case whose failure is written down and does not stop the others; its memory is given back."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the other cases are still wanted
            self.missing(name, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        release()


def release() -> None:
    """Give the memory of what is gone back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that all GPU benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of no size on any machine: shows that it runs")
    parser.add_argument("--results", type=Path, help="JSON file for the figures")
    return parser


def can_run(results: Results, tiny: bool) -> bool:
    """Whether there is a GPU, or none is wanted; says NOT RUN otherwise."""
    if tiny or torch.cuda.is_available():
        return True
    results.missing("all", "NOT RUN: no GPU; --tiny shows on a CPU that it runs")
    return False


def why_not(setting: str) -> str:
    """Why a setting cannot be built here; empty when it can."""
    try:
        choose_layers(config_from_dict({"model": SETTINGS[setting]}).model)
    except UserError as error:
        return f"NOT RUN: {' '.join(str(error).split())}"
    return ""


def run_config(setting: str, seq: int, windows: int, micro_batches: int, **sections: Any) -> RunConfig:
    """Training of `windows` x `micro_batches` windows of `seq` tokens a step."""
    model = {**SETTINGS[setting], **sections.pop("model", {})}
    train = {
        "steps": 1000,
        "seq_length": seq,
        "micro_batch_size": windows,
        "global_batch_size": windows * micro_batches,
    }
    base = {"run": {"arms": ["ntp"]}, "model": model, "train": train, "optimizer": {"lr": 1e-4}}
    return config_from_dict({**base, **sections})


def batches(a: Architecture, seq: int, windows: int, micro_batches: int, documents: int) -> list[TrainBatch]:
    """Packed micro-batches of random tokens, `documents` of equal length in every window."""
    chance, found = torch.Generator().manual_seed(0), []
    length = seq // documents
    assert length * documents == seq, "documents must divide the window"
    tokens = seq * windows
    for _ in range(micro_batches):
        ids = torch.randint(a.vocab_size, (tokens,), generator=chance)
        weight = torch.ones(tokens)
        weight[length - 1 :: length] = 0.0
        found.append(
            TrainBatch(
                input_ids=ids,
                labels=ids.roll(-1),
                position_ids=torch.arange(length).repeat(windows * documents),
                cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
                max_seqlen=length,
                weights={"cross_entropy": weight},
            )
        )
    return found


def engine_of(config: RunConfig, a: Architecture, parallel: Parallel) -> TrainEngine:
    """Random weights and the optimizer's state; the state itself is made by the first step."""
    seed_everything(0, parallel)
    chunks = build_model(a, config.model, parallel)
    return TrainEngine(config, a, parallel, chunks, [cross_entropy_component()], 1000)


def seconds(parallel: Parallel, work: Callable[[], object]) -> float:
    """Wall time until the device is done."""
    parallel.synchronize()
    start = time.perf_counter()
    work()
    parallel.synchronize()
    return time.perf_counter() - start


def with_windows(config: RunConfig, windows: int) -> RunConfig:
    """The same with another micro-batch."""
    return replace(config, train=replace(config.train, micro_batch_size=windows))


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """Names between commas. Ends the program for one that is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise SystemExit(f"{wrong[0]} is none of {', '.join(known)}")
    return names
