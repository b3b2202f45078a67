"""The memory estimate against the peaks that torch's allocator saw, and the largest model that trains by trying.

    python benchmarks/gpu_memory.py [--settings te-bf16,local-bf16,fp8-tensorwise] [--only estimate|largest]

Per shape, setting and recompute two training steps; the peak of the second over `config/estimate.py`'s figure must lie
within a tenth of 1. The largest model: layers are added to the shape of Qwen2.5-7B, whose width stays, until the
estimate no longer fits the device, and around that number by trying, halving the gap. What lies outside of torch's
allocator (the CUDA context) is not in either figure. On a CPU there are no peaks: --tiny shows that it runs.
"""

from dataclasses import replace
from typing import Any

import torch
from gpu_common import (
    SETTINGS,
    SHAPES,
    Results,
    batches,
    can_run,
    chosen,
    engine_of,
    parser_of,
    release,
    run_config,
    why_not,
)

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.estimate import OUTSIDE_OF_TORCH, Kernels, estimate_memory
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.model.factory import choose_layers
from ra3_megatron.parallel.groups import Parallel, initialize

NEAR = 0.1
"""Largest difference of the ratio from 1."""

CASES = (
    ("qwen2.5-1.5b", 4096, 1, "none"),
    ("qwen2.5-1.5b", 4096, 2, "none"),
    ("qwen2.5-1.5b", 4096, 2, "selective"),
    ("qwen2.5-1.5b", 4096, 4, "full"),
    ("qwen3-0.6b", 16384, 1, "none"),
    ("llama-3.2-1b", 8192, 1, "full"),
)
"""Shape, tokens of a window, windows of a micro-batch, recompute."""


def estimated(config: RunConfig, a: Architecture, parallel: Parallel) -> int:
    """Bytes by the estimate, for the layers that are really built."""
    kernels = Kernels(te=choose_layers(config.model).use_te, gpu=parallel.on_gpu)
    return estimate_memory(config, a, resolve_layout(config, 1, a), kernels).total


def peak(config: RunConfig, a: Architecture, parallel: Parallel) -> int | None:
    """Most bytes of the allocator in the second of two steps; none on a CPU."""
    engine = engine_of(config, a, parallel)
    data = batches(a, config.train.seq_length, config.train.micro_batch_size, 1, 1)
    engine.train_step(data, 1)
    parallel.synchronize()
    if parallel.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    engine.train_step(data, 2)
    parallel.synchronize()
    return parallel.peak_memory_bytes()


def compare(results: Results, setting: str, case: tuple[str, int, int, str], parallel: Parallel) -> None:
    """Peak over estimate of one case."""
    shape, seq, windows, recompute = case
    a, config = SHAPES[shape], run_config(setting, seq, windows, 1, model={"recompute": recompute})
    name, expected = f"{shape} seq {seq} x {windows} {setting} recompute {recompute}", estimated(config, a, parallel)
    found = peak(config, a, parallel)
    if found is None:
        results.missing(name, f"NOT RUN: no GPU, no peak; estimate {expected / 2**30:.2f} GiB")
        return
    ratio = found / expected
    note = f"{found / 2**30:.2f} GiB measured, {expected / 2**30:.2f} GiB estimated"
    results.add(f"{name}: off the estimate by", abs(ratio - 1), "of it", most=NEAR, note=note)


def fits(layers: int, setting: str, o: Any, parallel: Parallel) -> bool:
    """Whether two steps run with so many layers."""
    a = replace(SHAPES[o.wide], num_layers=layers)
    try:
        peak(run_config(setting, o.seq, 1, 1, model={"recompute": "full"}), a, parallel)
    except torch.OutOfMemoryError:
        return False
    finally:
        release()
    return True


def search(results: Results, setting: str, o: Any, parallel: Parallel) -> None:
    """Layers of the widest shape that train, by the estimate and by trying."""
    memory = torch.cuda.get_device_properties(parallel.device).total_memory - OUTSIDE_OF_TORCH

    def size(layers: int) -> Architecture:
        return replace(SHAPES[o.wide], num_layers=layers)

    config = run_config(setting, o.seq, 1, 1, model={"recompute": "full"})
    by_estimate = 1
    while estimated(config, size(by_estimate + 1), parallel) <= memory:
        by_estimate += 1
    low, high = max(1, round(0.8 * by_estimate)), round(1.25 * by_estimate) + 1
    if not fits(low, setting, o, parallel):
        raise RuntimeError(f"{low} layers do not fit, {by_estimate} should by the estimate")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, setting, o, parallel) else (low, middle)
    found, reckoned = size(low).parameter_count / 1e9, size(by_estimate).parameter_count / 1e9
    note = f"{low} layers of {o.wide}, seq {o.seq}, recompute full; by the estimate {reckoned:.2f} B"
    results.add(f"{setting}: largest model that trains", found, "B parameters", note=note)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--settings", default="te-bf16,local-bf16,fp8-tensorwise")
    parser.add_argument("--only", choices=("estimate", "largest"), help="one of the two parts")
    parser.add_argument("--wide", default="qwen2.5-7b", choices=SHAPES, help="shape whose layers are added")
    parser.add_argument("--seq", type=int, default=4096)
    options = parser.parse_args()
    results = Results("memory", options.results)
    if not can_run(results, options.tiny):
        return
    cases = (("tiny", 64, 1, "none"), ("tiny", 64, 1, "full")) if options.tiny else CASES
    with initialize() as parallel:
        for setting in chosen("local-bf16" if options.tiny else options.settings, list(SETTINGS)):
            if why := why_not(setting):
                results.missing(setting, why)
                continue
            for case in () if options.only == "largest" else cases:
                with results.case(f"{case[0]} seq {case[1]} x {case[2]} {setting} recompute {case[3]}"):
                    compare(results, setting, case, parallel)
            if options.only == "estimate":
                continue
            if not parallel.on_gpu:
                results.missing(f"{setting}: largest model that trains", "NOT RUN: no GPU, no memory to fill")
            else:
                with results.case(f"{setting}: largest model that trains"):
                    search(results, setting, options, parallel)


if __name__ == "__main__":
    main()
