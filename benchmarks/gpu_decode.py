"""Time of rollouts' passes: one token per row with and without CUDA graphs, and the reading of prompts.

    python benchmarks/gpu_decode.py [--shape tiny|qwen2.5-1.5b] [--precision fp32|bf16|fp8] [--batches 1 8 64]

Random weights of that shape. A decode pass is one `engine.step` in which every row goes on by a drawn token: the host's
planning, the copy to the device, the model, the draw, the copy back. The floor is what must be read of the device's
memory in a pass, weights, keys and values, at --bandwidth. Prompts are read in one call of `engine.step`, packed into
one attention call where the device has it, and with a call of its own per prompt. On a CPU, `tiny` shows what the host
does per pass: the model is next to nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import load_config
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.rollout.cache import ChunkCache
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.megatron import MegatronEngine

ROOT = Path(__file__).parents[1]
TINY = Architecture("qwen2", 2, 64, 4, 2, 16, 128, 512, True, True, max_positions=2048)


def shape_of(name: str) -> Architecture:
    """The shape of a configuration of this project, or the tiny one."""
    if name == "tiny":
        return TINY
    shape = load_config(ROOT / "configs" / f"{name}.yaml").model.architecture
    if shape is None:
        raise SystemExit(f"configs/{name}.yaml names no architecture")
    return shape


def microseconds(parallel: Parallel, work: Callable[[], object], count: int) -> list[float]:
    """Wall time of every one of `count` calls."""
    found = []
    for _ in range(count):
        parallel.synchronize()
        begin = time.perf_counter()
        work()
        parallel.synchronize()
        found.append((time.perf_counter() - begin) * 1e6)
    return found


def decode(engine: MegatronEngine, parallel: Parallel, prompt: int, tokens: int) -> list[float]:
    """Times of decode passes over all of the engine's rows, after `prompt` tokens each."""
    vocab = engine._vocab.vocab_size
    every, chance = engine.token_set(np.arange(vocab)), np.random.default_rng(0)
    rows = [engine.open(chance.integers(vocab, size=prompt).tolist()) for _ in range(engine.max_batch)]

    def step() -> None:
        queries = [Query(0, every, float(u)) for u in chance.random(len(rows))]
        engine.step([Extend(r, (), (q,), append=True) for r, q in zip(rows, queries, strict=True)])

    warm = 3 + tokens // 4
    found = microseconds(parallel, step, warm + tokens)[warm:]
    for row in rows:
        engine.close(row)
    return found


def read(engine: MegatronEngine, parallel: Parallel, lengths: np.ndarray, repeat: int) -> float:
    """Microseconds of reading prompts of these lengths in one step, the fastest of `repeat`."""
    vocab, chance = engine._vocab.vocab_size, np.random.default_rng(1)
    texts = [chance.integers(vocab, size=n).tolist() for n in lengths]

    def step() -> None:
        rows = [engine.open(t[:1]) for t in texts]
        engine.step([Extend(r, t[1:]) for r, t in zip(rows, texts, strict=True)])
        for row in rows:
            engine.close(row)

    return min(microseconds(parallel, step, repeat + 2)[2:])


def unpack(engine: MegatronEngine, parallel: Parallel) -> None:
    """A call of its own for every prompt, as on a device without packed attention."""
    forward = engine._forward
    forward.packs, forward.caches = False, []  # the old memory first
    forward.caches = [ChunkCache(c, forward.slots, forward.length, parallel.device) for c in forward.chunks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp8"])
    parser.add_argument("--recipe", default="tensorwise")
    parser.add_argument("--layers", default="auto", choices=["auto", "local", "te"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="of the device's memory, TB/s")
    options = parser.parse_args()
    shape = shape_of(options.shape)
    model = ModelConfig(precision=options.precision, layers=options.layers, fp8_recipe=options.recipe)
    with initialize() as parallel:
        seed_everything(0, parallel)
        chunks = build_model(shape, model, parallel)
        room = 2 * options.tokens + options.prompt
        print(f"{shape.parameter_count / 1e6:.1f} M parameters, {options.precision}, {parallel.device}")
        for batch in options.batches:
            for graphs in (None, False) if parallel.on_gpu else (False,):
                engine = MegatronEngine(chunks, shape, parallel, batch, room, cuda_graphs=graphs)
                found = decode(engine, parallel, options.prompt, options.tokens)
                median = statistics.median(found)
                floor = ""
                if parallel.on_gpu:
                    weights = {"fp32": 4, "bf16": 2, "fp8": 1}[options.precision] * shape.parameter_count
                    seen = engine.cache_bytes * (options.prompt + options.tokens) / engine._forward.length
                    floor = f", {median / ((weights + seen) / options.bandwidth / 1e6):.2f}x the floor"
                print(
                    f"batch {batch:3d}, {engine.description.rpartition('; ')[2]}: median {median:.0f} us a pass, least "
                    f"{min(found):.0f}; {batch / median * 1e6:.0f} tokens/s{floor}; {engine.counters.graph_passes} of "
                    f"{engine.counters.decode_passes} replayed",
                    flush=True,
                )
        lengths = np.random.default_rng(2).integers(options.prompt // 2, options.prompt + 1, size=options.batches[-1])
        engine = MegatronEngine(chunks, shape, parallel, len(lengths), room)
        for packed in (True, False) if engine._forward.packs else (False,):
            if not packed and engine._forward.packs:
                unpack(engine, parallel)
            spent = read(engine, parallel, lengths, 5)
            how = "packed" if packed else "one attention call per prompt"
            print(f"{len(lengths)} prompts, {lengths.sum()} tokens, {how}: {spent:.0f} us")


if __name__ == "__main__":
    main()
