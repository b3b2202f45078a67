"""Seconds of interleaved rollouts: against one forward pass, a line-by-line loop, and `transformers` called per line.

    python benchmarks/rollout.py [--model quickstart|FOLDER] [--rates 0 0.1 0.3 1] [--snippets 32] [--group 1]

FOLDER is a Hugging Face model or a checkpoint of `ra3 convert import` (models/smollm2-135m after `make smollm2`);
`quickstart` has that configuration's shape and random weights. Whether to think is decided by the random numbers
alone, so that the think rate is the one asked for; a thought has at most --thought tokens. All of it in one process,
in turn, the fastest of --repeat runs each: the floor is one forward pass over the tokens that the rollouts end with,
all rows in one batch. The loop has the same engine and cache and takes a row at a time: a pass for the decision, one
per token of a thought, one for the line; `batched` is the same loop with all rows side by side. `transformers` runs
on --subset rows (default: all), and so do we where we are compared with it. With --group G each snippet has that many
rollouts, and ours is compared with the floor alone. Seconds are processor seconds, so that others on the machine do
not count.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ra3_megatron.checkpoint.convert import export_hf
from ra3_megatron.checkpoint.weights import load_weights
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.data import CorpusConfig, DataConfig, FilterConfig, TokenizerConfig
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import load_config
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.prepare import prepare, prepare_tokenizer
from ra3_megatron.data.trajectory import Kind, Trajectory
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, ThoughtRules, rollout
from ra3_megatron.rollout.megatron import MegatronEngine

ROOT = Path(__file__).parents[1]
FLOOR_TARGETS = ((0.1, 2.0), (0.3, 4.0))
"""(think rate up to which, most seconds relative to the floor)."""


class Forced:
    """Uniforms that think at a share of the lines whatever the model says."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, number: int, member: int, shape: tuple[int, int]) -> np.ndarray:
        uniforms = np.random.default_rng([1, number, member]).random(shape)
        uniforms[:, 0] = np.where(uniforms[:, 0] < self.rate, 0.0, np.nextafter(1.0, 0.0))
        return uniforms


@dataclass
class Bench:
    """What every loop runs on."""

    chunks: list
    shape: Architecture
    parallel: Any
    experts: list[Trajectory]
    think_tokens: ThinkTokens
    settings: RolloutSettings
    uniforms: Forced
    room: int
    group: int = 1

    def engine(self, rows: int) -> MegatronEngine:
        return MegatronEngine(self.chunks, self.shape, self.parallel, rows, self.room)

    def interleaved(self, engine: MegatronEngine, count: int) -> list[Rollout]:
        return rollout(engine, self.experts[:count], self.group, self.uniforms, self.settings, self.think_tokens)


def floor(engine: MegatronEngine, texts: Sequence[np.ndarray]) -> None:
    """One pass over whole texts that scores every token."""
    rows = [engine.open(ids[:1].tolist()) for ids in texts]
    engine.step([Extend(row, ids[1:].tolist()) for row, ids in zip(rows, texts, strict=True)])
    for row in rows:
        engine.close(row)


def one_row(bench: Bench, engine: MegatronEngine, number: int):
    """Line by line, as the algorithm is written: yields what the row needs next, is sent the answer; returns ids."""
    expert, rules = bench.experts[number], ThoughtRules(engine, bench.think_tokens)
    uniforms = bench.uniforms(number, 0, (expert.num_lines, 1 + bench.settings.max_latent_tokens))
    first = expert.segments[0]
    ids = expert.ids[: first.end if first.kind == Kind.PROMPT else 1].tolist()
    row = engine.open(ids)
    decisions = {d.line: d for d in expert.decisions}
    for segment in (s for s in expert.segments if s.kind == Kind.CODE):
        line = expert.ids[segment.start : segment.end].tolist()
        start, decision = engine.length(row), decisions.get(segment.line)
        if decision is not None:
            numbers = uniforms[segment.line]
            query = Query(len(decision.forced), rules.deciding(decision.think_set), float(numbers[1]))
            answer = yield Extend(row, decision.forced, [query])
            if numbers[0] < np.exp(answer.log_masses[0]):
                token = int(answer.drawn[0])
                carry, count = [token, *rules.forced_after(decision.think_set, token)], 1
                while token not in rules.closing and count < bench.settings.max_latent_tokens:
                    query = Query(len(carry), rules.allowed, float(numbers[1 + count]))
                    answer = yield Extend(row, carry, [query], append=True)
                    token, carry, count = int(answer.drawn[0]), [], count + 1
                if token not in rules.closing:
                    carry = [*carry, *rules.ending]
                yield Extend(row, [*carry, *line])
                continue
            engine.rollback(row, start)
        skipped = engine.length(row) - start if start else 0
        yield Extend(row, line[skipped:])
    ids = engine._rows[row].ids.copy()
    engine.close(row)
    return ids


def line_by_line(bench: Bench, engine: MegatronEngine, numbers: Sequence[int]) -> list[list[int]]:
    """The rows `numbers` side by side, each at its own line."""
    walks = {n: one_row(bench, engine, n) for n in numbers}
    wanted = {n: next(walk) for n, walk in walks.items()}
    done: dict[int, list[int]] = {}
    while wanted:
        answers = engine.step(list(wanted.values()), bench.settings.temperature)
        for n, answer in zip(list(wanted), answers, strict=True):
            try:
                wanted[n] = walks[n].send(answer)
            except StopIteration as end:
                done[n] = end.value
                del wanted[n]
    return [done[n] for n in numbers]


def per_line_transformers(bench: Bench, model: Any, count: int) -> int:
    """`generate` for every decision and thought, a forward pass for every line; returns tokens of the final texts."""
    think_tokens, latent = bench.think_tokens, bench.settings.max_latent_tokens
    closing = think_tokens.closing_ids.tolist()
    options = {"do_sample": True, "top_k": 0, "pad_token_id": 0}
    total = 0
    for number, expert in enumerate(bench.experts[:count]):
        uniforms = bench.uniforms(number, 0, (expert.num_lines, 1 + latent))
        first = expert.segments[0]
        ids = expert.ids[: first.end if first.kind == Kind.PROMPT else 1].tolist()
        decisions = {d.line: d for d in expert.decisions}
        for segment in (s for s in expert.segments if s.kind == Kind.CODE):
            line = expert.ids[segment.start : segment.end].tolist()
            if segment.line in decisions:
                at = torch.tensor([[*ids, *decisions[segment.line].forced]])
                asked = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
                out = model.generate(at, eos_token_id=closing, **asked, **options)
                opening = torch.from_numpy(think_tokens[decisions[segment.line].think_set].ids)
                if uniforms[segment.line, 0] < float(out.logits[0][0].softmax(-1)[opening].sum()):
                    token = int(opening[torch.multinomial(out.logits[0][0, opening].softmax(-1), 1)])
                    start = torch.cat((at, torch.tensor([[token]])), 1)
                    ids = model.generate(start, max_new_tokens=latent - 1, eos_token_id=closing, **options)[0].tolist()
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *line]]), use_cache=False).logits[0, len(ids) - 1 : -1]
            logits.float().log_softmax(-1).gather(1, torch.tensor(line)[:, None]).sum().item()
            ids += line
        total += len(ids)
    return total


def fastest(repeat: int, work: Callable[[], Any]) -> float:
    """Processor seconds (one thread) of the fastest of `repeat` runs."""
    seconds = []
    for _ in range(repeat):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def verdict(value: float, target: float, least: bool) -> str:
    met = value >= target if least else value <= target
    return f"{value:6.2f}x (target {'>=' if least else '<='} {target:g}: {'met' if met else 'MISSED'})"


def measure(bench: Bench, model: Any, rate: float, subset: int, repeat: int) -> None:
    """Run all loops at one think rate and print the figures."""
    bench.uniforms = Forced(rate)
    if bench.group > 1:
        measure_groups(bench, rate, repeat)
        return
    rows = len(bench.experts)
    engine, alone, few = bench.engine(rows), bench.engine(1), bench.engine(subset)
    found = bench.interleaved(engine, rows)
    passes, fed = engine.counters.forward_passes, engine.counters.tokens
    texts = [r.trajectory.ids for r in found]
    tokens = sum(map(len, texts))
    same = [a == b.tolist() for a, b in zip(line_by_line(bench, engine, range(rows)), texts, strict=True)]
    seconds = {"floor": [], "ours": [], "batched loop": []}
    for _ in range(repeat):  # in turn, so that a busy machine slows all alike
        seconds["floor"].append(fastest(1, lambda: floor(engine, texts)))
        seconds["ours"].append(fastest(1, lambda: bench.interleaved(engine, rows)))
        seconds["batched loop"].append(fastest(1, lambda: line_by_line(bench, engine, range(rows))))
    best = {name: min(values) for name, values in seconds.items()}
    small = fastest(repeat, lambda: bench.interleaved(few, subset))
    loop = fastest(1, lambda: [line_by_line(bench, alone, [n]) for n in range(rows)])
    thoughts = np.mean(np.concatenate([r.thought for r in found]))
    target = next((t for limit, t in FLOOR_TARGETS if rate <= limit), None)
    ratio = best["ours"] / best["floor"]
    print(f"think rate {thoughts:.3f}: {rows} rows, {tokens} final tokens, {fed} fed in {passes} passes; "
          f"{sum(same)} of {rows} texts are the loop's")  # fmt: skip
    print(f"    floor {best['floor']:.3f} s, ours {best['ours']:.3f} s = "
          + (verdict(ratio, target, least=False) if target else f"{ratio:6.2f}x of the floor"))  # fmt: skip
    gain = loop / best["ours"]
    print(f"    loop, a row at a time {loop:.3f} s = "
          + (verdict(gain, 5, least=True) if rate <= 0.1 else f"{gain:6.2f}x ours")
          + f"; batched {best['batched loop']:.3f} s = {best['batched loop'] / best['ours']:.2f}x ours")  # fmt: skip
    if model is not None:
        torch.manual_seed(0)
        peer = fastest(1, lambda: per_line_transformers(bench, model, subset))
        ratio = verdict(peer / small, 10, least=True)
        print(f"    {subset} rows: ours {small:.3f} s, transformers {peer:.3f} s = {ratio}")


def measure_groups(bench: Bench, rate: float, repeat: int) -> None:
    """Rollouts in groups against the floor."""
    engine = bench.engine(len(bench.experts) * bench.group)
    found = bench.interleaved(engine, len(bench.experts))
    passes, fed = engine.counters.forward_passes, engine.counters.tokens
    texts = [r.trajectory.ids for r in found]
    thoughts = np.mean(np.concatenate([r.thought for r in found]))
    least = fastest(repeat, lambda: floor(engine, texts))
    ours = fastest(repeat, lambda: bench.interleaved(engine, len(bench.experts)))
    tokens = sum(map(len, texts))
    print(f"think rate {thoughts:.3f}: groups of {bench.group}, {tokens} final tokens, {fed} fed in {passes} passes; "
          f"floor {least:.3f} s, ours {ours:.3f} s = {ours / least:.2f}x of the floor")  # fmt: skip


def load(name: str, folder: Path, parallel: Any) -> tuple[list, Architecture, TokenizerConfig, Path]:
    """Model chunks, their shape, the tokenizer to use, and the model as a Hugging Face folder."""
    if name == "quickstart":
        shape = load_config(ROOT / "configs" / "quickstart.yaml").model.architecture
        assert shape is not None
        from transformers import AutoConfig, AutoModelForCausalLM

        from ra3_megatron.checkpoint.convert import import_hf

        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.to_hf())).save_pretrained(folder / "hf")
        import_hf(folder / "hf", folder / "checkpoint")
        checkpoint, tokenizer = folder / "checkpoint", TokenizerConfig("train_bpe", vocab_size=shape.vocab_size)
    else:
        checkpoint = Path(name)
        if not is_done(checkpoint):
            raise SystemExit(
                f"{name} is no checkpoint of `ra3 convert import`; run `make smollm2` for models/smollm2-135m"
            )
        shape = Architecture.from_folder(checkpoint / "hf")
        export_hf(checkpoint, folder / "hf")
        tokenizer = TokenizerConfig("hf", path=str(folder / "hf"))
    chunks = build_model(shape, ModelConfig(), parallel)
    load_weights(checkpoint, chunks, shape, parallel)
    return chunks, shape, tokenizer, folder / "hf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--snippets", type=int, default=32)
    parser.add_argument("--snippet-tokens", type=int, default=256)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--thought", type=int, default=8)
    parser.add_argument("--subset", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, initialize() as parallel:
        seed_everything(0, parallel)
        chunks, shape, tokenizer_config, hf = load(options.model, Path(temporary), parallel)
        filters = FilterConfig(min_tokens=options.snippet_tokens // 2)
        data = DataConfig(CorpusConfig(limit=60), tokenizer_config, filters, workers=1)
        tokenizer = prepare_tokenizer(data, Path(temporary) / "tokenizer")
        corpus = prepare(data, tokenizer, options.snippet_tokens, Path(temporary) / "corpus")
        experts = sorted((corpus.train[i] for i in range(4 * options.snippets)), key=lambda t: -len(t.ids))
        bench = Bench(
            chunks, shape, parallel, experts[: options.snippets], corpus.think_tokens,
            RolloutSettings(max_latent_tokens=options.thought), Forced(0.0), min(2048, shape.max_positions),
            options.group,
        )  # fmt: skip
        model = None
        if not options.no_transformers:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
        lines = sum(t.num_lines for t in bench.experts)
        print(f"{shape.parameter_count / 1e6:.1f} M parameters, {lines} lines, one thread")
        for rate in options.rates:
            measure(bench, model, rate, options.subset or options.snippets, options.repeat)


if __name__ == "__main__":
    main()
