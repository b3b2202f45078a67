"""Rollouts on a GPU: the E-step's over their floor, plain generation against `transformers`, and the log-prob gap.

    python benchmarks/gpu_rollout.py [--shape qwen2.5-1.5b] [--settings te-bf16,fp8-tensorwise] [--rates 0.02 0.1 0.3]

Random weights of that shape; snippets of the Python library with a tokenizer trained on it. `floor` is one forward pass
over the tokens that the rollouts end with (targets of benchmarks/rollout.py: 2 x up to a think rate of 0.1, 4 x up to
0.3). Generation: --prompts prompts at once, all --tokens long, temperature 1 from the whole vocabulary, here and with
`transformers` generate in BF16 on the same device. The gap is the largest and the mean difference between the log-probs
that were sampled at and those of the model as it trains, on the same tokens. Wall time, the fastest of --repeat.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_common import (
    SETTINGS,
    SHAPES,
    Results,
    can_run,
    chosen,
    parser_of,
    release,
    run_config,
    seconds,
    why_not,
)
from rollout import FLOOR_TARGETS, Bench, Forced, floor

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.data import CorpusConfig, DataConfig, FilterConfig, TokenizerConfig
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.data.prepare import PreparedCorpus, prepare, prepare_tokenizer
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.rollout.completion import Completion, CompletionSettings, Prompt, complete
from ra3_megatron.rollout.interleaved import RolloutSettings
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import score_labels
from ra3_megatron.training.schedule import pack_micro_batches

GENERATION_TARGET = 1.0
"""Tokens per second over those of `transformers`."""


def interleaved(results: Results, name: str, bench: Bench, rate: float, repeat: int) -> None:
    """Seconds of the E-step's rollouts over those of one pass over their tokens."""
    bench.uniforms = Forced(rate)
    rows = len(bench.experts)
    engine = bench.engine(rows)
    found = bench.interleaved(engine, rows)
    passes, fed = engine.counters.forward_passes, engine.counters.tokens
    texts = [r.trajectory.ids for r in found]
    rolled = min(seconds(bench.parallel, lambda: bench.interleaved(engine, rows)) for _ in range(repeat))
    once = min(seconds(bench.parallel, lambda: floor(engine, texts)) for _ in range(repeat))
    thinks = float(np.mean(np.concatenate([r.thought for r in found])))
    most = next((t for limit, t in FLOOR_TARGETS if rate <= limit), None)
    note = f"{rows} rows, {sum(map(len, texts))} tokens, {fed} fed in {passes} passes, {rolled:.3f} s over {once:.3f} s"
    results.add(f"{name}: rollouts at think rate {thinks:.2f}", rolled / once, "x the floor", most=most, note=note)


def generate(bench: Bench, prompts: list[Prompt], tokens: int, tokenizer: Any) -> list[Completion]:
    """Completions of full length."""
    room = max(len(p.ids) for p in prompts) + tokens
    engine = MegatronEngine(bench.chunks, bench.shape, bench.parallel, len(prompts), room)
    return complete(engine, prompts, CompletionSettings(tokens), tokenizer, seed=1)


def peer_seconds(a: Architecture, prompts: list[Prompt], tokens: int, parallel: Parallel, repeat: int) -> float:
    """Seconds of `transformers` generate for as many tokens, weights of the same shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if parallel.on_gpu else torch.float32
    with torch.device(parallel.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**a.to_hf()), dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(np.stack([p.ids for p in prompts]), dtype=torch.long, device=parallel.device)
    options = {"max_new_tokens": tokens, "do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}

    def work() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return min(seconds(parallel, work) for _ in range(repeat))


def gap(bench: Bench, config: Any, drawn: list[Completion]) -> tuple[float, float]:
    """Largest and mean |log-prob when sampled - log-prob of the model in training|, nats."""
    whole = [np.concatenate((c.prompt.ids, c.ids)).astype(np.int32) for c in drawn]
    marks = [np.concatenate((np.zeros(len(c.prompt.ids)), np.ones(len(c.ids)))).astype(np.float32) for c in drawn]
    old = [np.concatenate((np.zeros(len(c.prompt.ids)), c.log_probs)).astype(np.float32) for c in drawn]
    sequences = [TrainSequence(i, {"drawn": m}, {"old": o}) for i, m, o in zip(whole, marks, old, strict=True)]
    packed, _ = pack_micro_batches(sequences, config.train, bench.parallel, ("drawn",), ("old",))
    scored = score_labels(bench.chunks, bench.shape, bench.parallel, packed)
    differences = [
        (new.cpu() - b.extras["old"])[b.weights["drawn"] != 0].abs() for b, new in zip(packed, scored, strict=True)
    ]
    every = torch.cat(differences)
    return float(every.max()), float(every.mean())


def measure(
    results: Results, setting: str, a: Architecture, corpus: PreparedCorpus, parallel: Parallel, o: Any, peer: float
) -> None:
    """All figures of one setting; `peer` is the seconds of `transformers`, infinite without it."""
    name, config = f"{o.shape} {setting}", run_config(setting, o.seq, 1, 1)
    seed_everything(0, parallel)
    chunks = build_model(a, config.model, parallel)
    experts = sorted((corpus.train[i] for i in range(4 * o.snippets)), key=lambda t: -len(t.ids))[: o.snippets]
    bench = Bench(
        chunks, a, parallel, experts, corpus.think_tokens, RolloutSettings(max_latent_tokens=o.thought), Forced(0.0),
        o.seq,
    )  # fmt: skip
    for rate in o.rates:
        interleaved(results, name, bench, rate, o.repeat)
    prompts = prompts_of(o, a)
    drawn = generate(bench, prompts, o.tokens, corpus.tokenizer)
    took = min(seconds(parallel, lambda: generate(bench, prompts, o.tokens, corpus.tokenizer)) for _ in range(o.repeat))
    count = sum(len(c.ids) for c in drawn)
    results.add(f"{name}: generation", count / took, "tokens/s", note=f"{len(prompts)} rows of {o.tokens}")
    if np.isfinite(peer):
        least = None if o.tiny else GENERATION_TARGET
        results.add(f"{name}: generation over transformers", count / took / (count / peer), "x", least=least)
    largest, mean = gap(bench, config, drawn)
    results.add(f"{name}: largest log-prob gap", largest, "nats", note=f"mean {mean:.2e}, {count} tokens")


def prompts_of(o: Any, a: Architecture) -> list[Prompt]:
    """Prompts of one length, so that `transformers` need not pad."""
    chance = np.random.default_rng(0)
    return [Prompt(chance.integers(a.vocab_size, size=o.prompt).astype(np.int32), i) for i in range(o.prompts)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=SHAPES)
    parser.add_argument("--settings", default="te-bf16,fp8-tensorwise,local-bf16")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.1, 0.3])
    parser.add_argument("--snippets", type=int, default=64)
    parser.add_argument("--snippet-tokens", type=int, default=400)
    parser.add_argument("--thought", type=int, default=16)
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a row at most")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.snippets, options.snippet_tokens, options.seq = "tiny", 2, 64, 256
        options.prompts, options.prompt, options.tokens, options.repeat, options.rates = 2, 8, 8, 1, [0.3]
        options.settings = "local-fp32"
    results = Results("rollout", options.results)
    if not can_run(results, options.tiny):
        return
    a = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as temporary, initialize() as parallel:
        filters = FilterConfig(min_tokens=options.snippet_tokens // 2)
        tokens = TokenizerConfig("train_bpe", vocab_size=min(a.vocab_size, 4096))
        data = DataConfig(CorpusConfig(limit=8 if options.tiny else 60), tokens, filters, workers=1)
        tokenizer = prepare_tokenizer(data, Path(temporary) / "tokenizer")
        corpus = prepare(data, tokenizer, options.snippet_tokens, Path(temporary) / "corpus")
        peer = float("inf")
        with results.case("transformers"):
            peer = peer_seconds(a, prompts_of(options, a), options.tokens, parallel, options.repeat)
            rate = options.prompts * options.tokens / peer
            results.add(f"{options.shape} transformers: generation", rate, "tokens/s")
        release()
        for setting in chosen(options.settings, list(SETTINGS)):
            if why := why_not(setting):
                results.missing(f"{options.shape} {setting}", why)
                continue
            with results.case(f"{options.shape} {setting}"):
                measure(results, setting, a, corpus, parallel, options, peer)


if __name__ == "__main__":
    main()
