"""Interleaved rollouts: tokens and forward passes against the floor of one pass over the final tokens.

Usage: python benchmarks/rollouts.py [--snippets 16] [--snippet-tokens 400] [--group-size 8] [--think-rate 0.02 0.1 0.4]
The model has the quick start's shape and random weights, thoughts have 8 tokens; whether to think is decided by the
random numbers alone, so that the think rate is the one asked for. `shared`: tokens of a row before its first thought,
which are the same for the whole group; `once`: those that would be left if a group computed them together.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.data import CorpusConfig, DataConfig, TokenizerConfig
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.prepare import prepare, prepare_tokenizer
from ra3_megatron.data.trajectory import Trajectory
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine

VOCABULARY, THOUGHT = 4096, 8


class Forced:
    """Uniforms that think at a share of the lines whatever the model says."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, number: int, member: int, shape: tuple[int, int]) -> np.ndarray:
        uniforms = np.random.default_rng([1, number, member]).random(shape)
        uniforms[:, 0] = np.where(uniforms[:, 0] < self.rate, 0.0, np.nextafter(1.0, 0.0))
        return uniforms


def before_thoughts(rollouts: list[Rollout], experts: list[Trajectory]) -> tuple[int, int]:
    """Tokens before each row's first thought, and the longest such prefix of each group, summed over groups."""
    prefixes = defaultdict(list)
    for one in rollouts:
        expert, thoughts = experts[one.number], one.trajectory.thoughts()
        first = min(thoughts, default=None)
        at = len(expert.ids) if first is None else next(d.position for d in expert.decisions if d.line == first)
        prefixes[one.number].append(at)
    return sum(map(sum, prefixes.values())), sum(map(max, prefixes.values()))


def main() -> None:
    """Draw the rollouts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snippets", type=int, default=16)
    parser.add_argument("--snippet-tokens", type=int, default=400)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--think-rate", type=float, nargs="+", default=[0.02, 0.1, 0.4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = DataConfig(CorpusConfig(limit=60), TokenizerConfig("train_bpe", vocab_size=VOCABULARY), workers=1)
    shape = Architecture(
        family="qwen2", num_layers=4, hidden_size=192, num_heads=6, num_kv_heads=2, head_dim=32, ffn_hidden_size=512,
        vocab_size=VOCABULARY, tied_embeddings=True, qkv_bias=True, max_positions=2048,
    )  # fmt: skip
    print(f"{'rate':>6} {'rows':>5} {'passes':>7} {'tokens':>8} {'floor':>8} {'ratio':>6} {'back':>6} {'shared':>7} "
          f"{'once':>6} {'tokens/s':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, initialize() as parallel:
        tokenizer = prepare_tokenizer(config, Path(folder) / "tokenizer")
        corpus = prepare(config, tokenizer, arguments.snippet_tokens, Path(folder) / "corpus")
        experts = [corpus.train[i] for i in range(min(arguments.snippets, len(corpus.train)))]
        seed_everything(0, parallel)
        chunks = build_model(shape, ModelConfig(), parallel)
        for rate in arguments.think_rate:
            engine = MegatronEngine(chunks, shape, parallel, max_batch=64, max_tokens=2048)
            settings = RolloutSettings(max_latent_tokens=THOUGHT)
            begin = time.perf_counter()
            found = rollout(engine, experts, arguments.group_size, Forced(rate), settings, corpus.think_tokens)
            seconds = time.perf_counter() - begin
            thought = np.concatenate([r.thought for r in found]).mean()
            floor, counters = sum(len(r.trajectory.ids) for r in found), engine.counters
            shared, once = before_thoughts(found, experts)
            print(f"{thought:6.3f} {len(found):5d} {counters.forward_passes:7d} {counters.tokens:8d} {floor:8d} "
                  f"{counters.tokens / floor:6.3f} {counters.rolled_back:6d} {shared:7d} {once:6d} "
                  f"{floor / seconds:8.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
