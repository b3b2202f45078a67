"""Tokens per second and model FLOPs utilisation of whole training steps, in BF16 and with every FP8 recipe.

    python benchmarks/gpu_training.py [--shape qwen2.5-1.5b] [--seq 4096] [--settings local-bf16,te-bf16,fp8-tensorwise]

Our engine with random weights on packed windows of random tokens: forward, backward, clipping, AdamW. MFU is the
model's operations (6 per weight and token, and attention) per second, of --ceiling and of a matrix product of 8192
measured in the same process. The micro-batch is the largest that fits by the memory estimate, at most --windows. FP8 is
compared with the fastest BF16. After the timed steps one is traced: the kinds of kernels that took longest are printed.
"""

import statistics
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
    run_config,
    seconds,
    why_not,
)
from torch.profiler import ProfilerActivity, profile

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.estimate import flops, largest_micro_batch
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.parallel.groups import Parallel, initialize
from ra3_megatron.parallel.speed import measure_speed
from ra3_megatron.report.op_kinds import GEMM
from ra3_megatron.stages.profile_trace import summarise
from ra3_megatron.training.engine import TrainEngine

MFU_TARGET, FP8_TARGET = 0.5, 1.3
"""Of --ceiling in BF16, and tokens per second of FP8 over BF16."""


def fitting(config: RunConfig, a: Architecture, parallel: Parallel, most: int) -> int:
    """Windows of a micro-batch."""
    if not parallel.on_gpu:
        return most
    memory = torch.cuda.get_device_properties(parallel.device).total_memory
    # The estimate is unchecked on this chip before this very run: some room is left.
    return max(1, min(most, largest_micro_batch(config, a, resolve_layout(config, 1, a), int(0.93 * memory))))


def step_seconds(engine: TrainEngine, parallel: Parallel, data: list[Any], warm: int, steps: int) -> list[float]:
    """Wall time of each of `steps` steps after `warm` others."""
    number = iter(range(1, 1 + warm + steps))
    times = [seconds(parallel, lambda: engine.train_step(data, next(number))) for _ in range(warm + steps)]
    return times[warm:]


def traced(engine: TrainEngine, parallel: Parallel, data: list[Any], number: int) -> dict[str, float]:
    """Kinds of operations of one step, and their share of it, the largest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * parallel.on_gpu
    with profile(activities=activities, acc_events=True) as tracer:
        engine.train_step(data, number)
        parallel.synchronize()
    kinds: dict[str, float] = {}
    for part in summarise(tracer.events()).parts:
        kinds[part.kind] = kinds.get(part.kind, 0.0) + part.seconds
    total = sum(kinds.values()) or 1.0
    return {kind: s / total for kind, s in sorted(kinds.items(), key=lambda kv: -kv[1])}


def measure(results: Results, setting: str, a: Architecture, parallel: Parallel, options: Any, speed: float) -> float:
    """All figures of one setting; returns its tokens per second."""
    config = run_config(setting, options.seq, 1, 1, model={"recompute": options.recompute})
    windows = fitting(config, a, parallel, options.windows)
    config = run_config(setting, options.seq, windows, options.micro_batches, model={"recompute": options.recompute})
    engine = engine_of(config, a, parallel)
    data = batches(a, options.seq, windows, options.micro_batches, options.documents)
    took = statistics.median(step_seconds(engine, parallel, data, options.warm, options.steps))
    tokens = options.seq * windows * options.micro_batches
    rate, name = tokens / took, f"{options.shape} seq {options.seq} {setting}"
    used = flops(a, tokens, options.seq / 2 / options.documents, training=True) / took
    batch = f"{options.micro_batches} x {windows} windows, recompute {options.recompute}"
    results.add(f"{name}: tokens/s", rate, "tokens/s", note=batch)
    target = MFU_TARGET if setting.endswith("bf16") and not options.tiny else None
    results.add(f"{name}: MFU of {options.ceiling:g} TFLOP/s", used / options.ceiling / 1e12, "", least=target)
    results.add(f"{name}: MFU of the measured product", used / speed, "", note=f"{speed / 1e12:.4g} TFLOP/s")
    if (peak := parallel.peak_memory_bytes()) is not None:
        results.add(f"{name}: most memory", peak / 2**30, "GiB")
    kinds = traced(engine, parallel, data, options.warm + options.steps + 1)
    said = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds.items())
    results.add(f"{name}: matrix products in a traced step", kinds.get(GEMM, 0.0), "of its time", note=said)
    return rate


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=SHAPES)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=1, help="of equal length in a window")
    parser.add_argument("--windows", type=int, default=4, help="of a micro-batch at most")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--settings", default="te-bf16,fp8-tensorwise,local-bf16,fp8-delayed,fp8-blockwise")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ceiling", type=float, default=790.0, help="TFLOP/s that MFU is quoted against")
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.seq, options.windows, options.warm, options.steps = "tiny", 64, 1, 1, 2
    results = Results("training", options.results)
    if not can_run(results, options.tiny):
        return
    names, rates = chosen(options.settings, list(SETTINGS)), {}
    with initialize() as parallel:
        speed = measure_speed(parallel, torch.bfloat16 if parallel.on_gpu else torch.float32, repeats=5)
        results.add("matrix product", speed.flops / 1e12, "TFLOP/s", note=f"{speed.matrix} rows and columns")
        results.add("copy", speed.bytes / 1e12, "TB/s", note="read and written")
        for setting in names:
            if why := why_not(setting):
                results.missing(f"{options.shape} seq {options.seq} {setting}", why)
                continue
            with results.case(f"{options.shape} seq {options.seq} {setting}"):
                rates[setting] = measure(results, setting, SHAPES[options.shape], parallel, options, speed.flops)
    best = max((rate for name, rate in rates.items() if name.endswith("bf16")), default=None)
    for setting, rate in rates.items():
        if best and setting.startswith("fp8"):
            ratio = f"{options.shape} seq {options.seq} {setting} over BF16"
            results.add(ratio, rate / best, "x tokens/s", least=FP8_TARGET)


if __name__ == "__main__":
    main()
