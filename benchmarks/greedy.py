"""Are greedy answers of `ra3 evaluate` those of `transformers` generate, problem by problem?

    ra3 evaluate CHECKPOINT --benchmarks humaneval --max-tokens 128 --data-dir DATA --out OUT
    ra3 convert export CHECKPOINT HF
    python benchmarks/greedy.py --out OUT --hf HF --data DATA/humaneval/HumanEval.jsonl.gz [--batch 8] [--limit N]

Reads the recorded token ids, lets `generate(do_sample=False)` of the exported model go on from the same prompts for as
many tokens, and prints the problems where an id differs, with the gap between the two best logits there: a gap of
rounding's size is a tie that two orders of summation break differently. Ends with 1 when a problem differs by more.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ra3_megatron.evaluation.journal import read_journals

TIE = 1e-3
"""Logits closer than this are a tie: fp32 sums of this size differ by about 1e-5 between two orders."""


def recorded(out: Path) -> dict[str, list[int]]:
    """Token ids of every greedy answer to HumanEval, by problem."""
    folders = sorted({file.parent for file in out.rglob("answers.*.jsonl")})
    found = [record for folder in folders for record in read_journals(folder, "answers").values()]
    return {r["task"]: r["ids"] for r in found if r["benchmark"] == "humaneval" and r["temperature"] == 0}


@torch.no_grad()
def theirs(model: Any, tokenizer: Any, prompts: Sequence[str], lengths: Sequence[int]) -> list[list[int]]:
    """What `generate` writes after each prompt, one batch padded on the left."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**batch, do_sample=False, max_new_tokens=max(lengths), pad_token_id=tokenizer.pad_token_id)
    start = batch["input_ids"].shape[1]
    return [row[start : start + n].tolist() for row, n in zip(ids, lengths, strict=True)]


@torch.no_grad()
def gap(model: Any, tokenizer: Any, prompt: str, written: Sequence[int]) -> float:
    """Difference of the two best logits after `written`."""
    ids = torch.tensor([[*tokenizer(prompt)["input_ids"], *written]])
    best = model(ids).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int, default=None)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(args.hf))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(str(args.hf), dtype=torch.float32).eval()
    answers = recorded(args.out)
    rows = [json.loads(line) for line in gzip.decompress(args.data.read_bytes()).splitlines()]
    prompts = {r["task_id"]: r["prompt"] for r in rows if r["task_id"] in answers}
    # Prompts of like length share a batch, so that little is padded.
    tasks = sorted(list(prompts)[: args.limit], key=lambda task: len(prompts[task]))
    if not tasks:
        sys.exit(f"no greedy answers to HumanEval under {args.out}")
    differing, ties, start = [], [], time.process_time()
    for at in range(0, len(tasks), args.batch):
        part = tasks[at : at + args.batch]
        found = theirs(model, tokenizer, [prompts[t] for t in part], [len(answers[t]) for t in part])
        for task, other in zip(part, found, strict=True):
            own = answers[task]
            if own == other:
                continue
            place = next(i for i, (a, b) in enumerate(zip(own, [*other, -1], strict=False)) if a != b)
            size = gap(model, tokenizer, prompts[task], own[:place])
            (ties if size < TIE else differing).append(task)
            print(f"{task}: token {place}: {own[place]}, theirs {other[place : place + 1]}, gap {size:.2e}")
        print(f"{at + len(part)} of {len(tasks)} problems, {time.process_time() - start:.0f} CPU s", flush=True)
    same = len(tasks) - len(differing) - len(ties)
    print(f"{same} of {len(tasks)} answers the same token by token; {len(ties)} part at a tie; {len(differing)} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
