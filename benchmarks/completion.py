"""Tokens per second of plain completions, against `transformers` generate with the same weights and batch.

    python benchmarks/completion.py [--model quickstart|smollm2|FOLDER] [--batches 16 64] [--prompts 128] [--bf16]

FOLDER is a checkpoint of `ra3 convert import` (models/smollm2-135m after `make smollm2`); the two names stand for
that shape with random weights. Prompts have 16 to --longest tokens. Both sample at temperature 1 from the whole
vocabulary, in fp32 (--bf16: in that) with a key/value cache, --batch rows at once, in one process and one thread, in
turn. Ends are drawn: a share of the ids, chosen so that about a half of the completions reach --tokens, ends a
completion; the share is the same for both, the random numbers are not, so tokens are counted. `transformers` gets
batches of prompts of like length, padded on the left as TRL does, and a row that has ended waits for the others of
its batch; ours go on with the next prompt. `equal` has no ends and all prompts at once: the same number of steps for
both. `group` has 8 completions per prompt. Seconds are processor seconds, on a GPU wall seconds with the device's
work done, after a first run of each that is not counted. The floor is one forward pass over the tokens of all rows at
once.
"""

import argparse
import itertools
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ra3_megatron.checkpoint.convert import export_hf, import_hf
from ra3_megatron.checkpoint.weights import load_weights
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import load_config
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.tokenizers import Tokenizer, load_folder, train_bpe
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.completion import CompletionSettings, Prompt, complete
from ra3_megatron.rollout.engine import Extend
from ra3_megatron.rollout.megatron import MegatronEngine

ROOT = Path(__file__).parents[1]
TARGET = 1.5
SMOLLM2 = Architecture(
    "llama", 30, 576, 9, 3, 64, 1536, 49152, True, False, rope_base=1e5, norm_eps=1e-5, max_positions=2048
)


@dataclass
class Bench:
    """What both sides run on."""

    chunks: list
    shape: Architecture
    parallel: Any
    tokenizer: Tokenizer
    model: Any
    prompts: list[Prompt]
    tokens: int

    def ours(self, batch: int, prompts: Sequence[Prompt], ends: float) -> tuple[int, MegatronEngine]:
        """Tokens drawn, and the engine that drew them."""
        room = max(len(p.ids) for p in prompts) + self.tokens
        engine = MegatronEngine(self.chunks, self.shape, self.parallel, batch, room)
        settings = CompletionSettings(self.tokens, stop_ids=tuple(stop_ids(self.tokenizer.vocab_size, ends)))
        found = complete(engine, prompts, settings, self.tokenizer, seed=1)
        return sum(len(c.ids) for c in found), engine

    def transformers(self, batch: int, prompts: Sequence[Prompt], ends: float) -> int:
        """Tokens drawn."""
        stops, total = stop_ids(self.shape.vocab_size, ends), 0
        order = sorted(prompts, key=lambda p: -len(p.ids))
        for rows in itertools.batched(order, batch):
            longest = max(len(p.ids) for p in rows)
            ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
            device = self.parallel.device
            for row, prompt in enumerate(rows):
                ids[row, longest - len(prompt.ids) :] = torch.from_numpy(prompt.ids)
                mask[row, longest - len(prompt.ids) :] = 1
            found = self.model.generate(
                ids.to(device), attention_mask=mask.to(device), max_new_tokens=self.tokens, do_sample=True, top_k=0,
                top_p=1.0, eos_token_id=stops or None, pad_token_id=0,
            )[:, longest:].cpu()  # fmt: skip
            ended = torch.isin(found, torch.tensor(stops, dtype=torch.long)).cumsum(1)
            total += int((ended == 0).sum()) + int((ended[:, -1] > 0).sum())
        return total

    def floor(self, prompts: Sequence[Prompt], fed: int) -> float:
        """Processor seconds of forward passes over about `fed` tokens, a thousand at a time, in rows of one length."""
        length = max(2, fed // len(prompts))
        rows = max(1, 1024 // length)
        engine = MegatronEngine(self.chunks, self.shape, self.parallel, rows, length)
        ids = np.arange(length) % self.shape.vocab_size
        begin, done = now(self.parallel), 0
        while done < fed:
            opened = [engine.open(ids[:1].tolist()) for _ in range(rows)]
            engine.step([Extend(row, ids[1:].tolist()) for row in opened])
            for row in opened:
                engine.close(row)
            done += rows * length
        return now(self.parallel) - begin


def now(parallel: Any) -> float:
    """Processor seconds; on a GPU wall seconds, with its work done."""
    parallel.synchronize()
    return time.perf_counter() if parallel.on_gpu else time.process_time()


def stop_ids(vocab_size: int, share: float) -> list[int]:
    """That share of the ids, evenly spread."""
    return np.linspace(1, vocab_size - 1, round(share * vocab_size)).astype(int).tolist()


def seconds(parallel: Any, work: Callable[[], Any]) -> tuple[float, Any]:
    if parallel.on_gpu:
        work()
    begin = now(parallel)
    result = work()
    return now(parallel) - begin, result


def measure(bench: Bench, batch: int, name: str, prompts: Sequence[Prompt], ends: float) -> None:
    """Print one line of figures."""
    spent, (tokens, engine) = seconds(bench.parallel, lambda: bench.ours(batch, prompts, ends))
    peer_spent, peer_tokens = seconds(bench.parallel, lambda: bench.transformers(batch, prompts, ends))
    speed, peer = tokens / spent, peer_tokens / peer_spent
    floor = bench.floor(prompts, engine.counters.tokens)
    met = "met" if speed / peer >= TARGET else "MISSED"
    print(
        f"batch {batch:3d} {name:7s} ours {tokens:6d} tokens, {speed:8.1f} per s in {engine.counters.forward_passes} "
        f"passes ({spent / floor:.2f}x the floor); transformers {peer_tokens:6d}, {peer:8.1f} per s: "
        f"{speed / peer:5.2f}x (target {TARGET}: {met})",
        flush=True,
    )


def load(name: str, folder: Path, parallel: Any, precision: str) -> tuple[list, Architecture, Tokenizer]:
    """Model chunks, their shape and a tokenizer; the Hugging Face folder is `folder`/hf."""
    if name in ("quickstart", "smollm2"):
        quickstart = load_config(ROOT / "configs" / "quickstart.yaml").model.architecture
        assert quickstart is not None
        shape = quickstart if name == "quickstart" else SMOLLM2
        from transformers import AutoConfig, AutoModelForCausalLM

        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.to_hf())).save_pretrained(folder / "hf")
        import_hf(folder / "hf", folder / "checkpoint")
        library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
        tokenizer: Tokenizer = train_bpe((p.read_text(encoding="utf-8") for p in library), quickstart.vocab_size)
        checkpoint = folder / "checkpoint"
    else:
        checkpoint = Path(name)
        if not is_done(checkpoint):
            raise SystemExit(f"{name} is no checkpoint of `ra3 convert import`; run `make smollm2` for one")
        shape = Architecture.from_folder(checkpoint / "hf")
        export_hf(checkpoint, folder / "hf")
        tokenizer = load_folder(folder / "hf")
    chunks = build_model(shape, ModelConfig(precision=precision), parallel)
    load_weights(checkpoint, chunks, shape, parallel)
    return chunks, shape, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--cases", nargs="+", default=["varying", "equal", "group"])
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, initialize() as parallel:
        seed_everything(0, parallel)
        chunks, shape, tokenizer = load(options.model, Path(temporary), parallel, "bf16" if options.bf16 else "fp32")
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if options.bf16 else torch.float32
        model = AutoModelForCausalLM.from_pretrained(Path(temporary) / "hf", dtype=dtype).eval().to(parallel.device)
        model.generation_config.eos_token_id = None
        chance = np.random.default_rng(0)
        lengths = chance.integers(16, options.longest + 1, size=options.prompts)
        prompts = [
            Prompt(chance.integers(tokenizer.vocab_size, size=n).astype(np.int32), i) for i, n in enumerate(lengths)
        ]
        bench = Bench(chunks, shape, parallel, tokenizer, model, prompts, options.tokens)
        ends = 0.7 / options.tokens  # a half of the completions reach the limit
        groups = [Prompt(p.ids, p.number, m) for p in prompts[: len(prompts) // 8] for m in range(8)]
        print(f"{shape.parameter_count / 1e6:.1f} M parameters, {dtype}, {parallel.device}")
        for batch in options.batches:
            for name, given, share in (
                ("varying", prompts, ends),
                ("equal", prompts[:batch], 0.0),
                ("group", groups, ends),
            ):
                if name in options.cases:
                    measure(bench, batch, name, given, share)


if __name__ == "__main__":
    main()
