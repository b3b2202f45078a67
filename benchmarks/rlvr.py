"""Tokens per second of a whole GRPO step, against TRL's GRPOTrainer: generation, reward, loss, update.

    python benchmarks/rlvr.py [--trl FOLDER] [--prompts 8] [--group 8] [--longest 64] [--tokens 64] [--ends 10]

The same random weights in the quick start's shape, the same prompts, answers of at most --tokens tokens, the same
reward (a function of the text, so that no judge is timed), DAPO's loss with clip-higher, AdamW, fp32, one thread, one
process, in turn. Answers end where the model draws its end of text, whose row of the embedding is --ends times as long
as drawn: at 10 answers are of all lengths, at 1 nearly all reach the limit. TRL waits for the longest answer of a batch
and trains on rows padded to it; here rows are packed. The first step of each is left out: it warms caches. Tokens are
those of prompts and answers, padding left out. Seconds are processor seconds, so that others on the machine do not
count; they slow it down all the same, the fastest step of each side the least. TRL is no dependency of this project;
install it beside, and name the folder:

    pip install --no-deps --target FOLDER trl==1.16.0 accelerate==1.15.0
"""

import argparse
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ra3_megatron.checkpoint.convert import import_hf
from ra3_megatron.checkpoint.weights import load_weights
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.run import RunConfig, load_config
from ra3_megatron.config.sections import ModelConfig, TrainConfig
from ra3_megatron.data.tokenizers import Tokenizer, train_bpe
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.rollout.answers import Judged
from ra3_megatron.rollout.completion import Completion, CompletionSettings, Prompt, complete
from ra3_megatron.rollout.groups import AnswerGroup, answer_batches, answer_sequences
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.stages.rlvr_policy import loss_components, training_config
from ra3_megatron.training.engine import TrainEngine

ROOT = Path(__file__).parents[1]
TARGET = 2.0
LR = 1e-6


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    texts: list[str]
    group: int
    tokens: int
    steps: int

    @property
    def answers(self) -> int:
        """Answers of a step."""
        return len(self.texts) * self.group


def reward_of(text: str) -> float:
    """Some property of a text that about half of all texts have."""
    return float(text.count("e") % 2)


@dataclass(frozen=True)
class Speed:
    """What one side needed."""

    counted: list[int]
    """Tokens of prompts and answers, by step."""
    seconds: list[float]
    """By step."""

    @property
    def tokens(self) -> int:
        """Tokens of all steps that count."""
        return sum(self.counted)

    @property
    def rate(self) -> float:
        """Tokens per second over all of them."""
        return self.tokens / sum(self.seconds)

    @property
    def best(self) -> float:
        """Tokens per second of the fastest step: the one that the machine's other work disturbed least."""
        return max(n / s for n, s in zip(self.counted, self.seconds, strict=True))


def ours(work: Work, checkpoint: Path, shape: Architecture, tokenizer: Tokenizer, parallel: Any) -> Speed:
    """Steps as `stages/rlvr.py` makes them, with the reward in the judge's place."""
    window = 2 ** (max(len(tokenizer.encode(t)) for t in work.texts) + work.tokens - 1).bit_length()
    rlvr = RlvrConfig(
        steps=1 + work.steps, tasks="none", prompts_per_step=len(work.texts), group_size=work.group,
        max_tokens=work.tokens, overlong="keep", lr=LR,
    )  # fmt: skip
    train = TrainConfig(seq_length=4 * window, micro_batch_size=1, steps=1)
    config = training_config(RunConfig(rlvr=rlvr, train=train))
    seed_everything(0, parallel)
    chunks = build_model(shape, ModelConfig(), parallel)
    load_weights(checkpoint, chunks, shape, parallel)
    trainer = TrainEngine(config, shape, parallel, chunks, loss_components(config), 1 + work.steps)
    rollouts = MegatronEngine(trainer.chunks, shape, parallel, work.answers, window)
    prompts = [
        Prompt(np.array(tokenizer.encode(t), dtype=np.int32), i, m)
        for i, t in enumerate(work.texts)
        for m in range(work.group)
    ]
    settings = CompletionSettings(work.tokens, stop_ids=(tokenizer.eos_id or 0,))
    ends, counted = [], []
    for step in range(1 + work.steps):
        rollouts.weights_version = step
        answers = complete(rollouts, prompts, settings, tokenizer, seed=step)
        groups = [judged(answers[i : i + work.group], tokenizer) for i in range(0, len(answers), work.group)]
        batches = answer_batches(answer_sequences(groups, rlvr, share=True), rlvr, train, parallel, 1)
        trainer.train_step(batches, step + 1)
        counted.append(sum(len(a.prompt.ids) + len(a.ids) for a in answers))
        ends.append(time.process_time())
    return Speed(counted[1:], np.diff(ends).tolist())


def judged(answers: Sequence[Completion], tokenizer: Tokenizer) -> AnswerGroup:
    """A group with its rewards."""
    texts = [tokenizer.decode(a.ids.tolist()) for a in answers]
    verdicts = [Judged("passed" if reward_of(t) else "wrong", 0, 1) for t in texts]
    number = answers[0].prompt.number
    return AnswerGroup.of(number, number, number, answers, verdicts)


def trl(work: Work, hf: Path, folder: Path) -> Speed:
    """The same through TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    counted: list[int] = []
    lengths = [len(tokenizer(t)["input_ids"]) for t in work.texts]

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        counted.append(sum(map(len, completion_ids)) + work.group * sum(lengths))
        return [reward_of(text) for text in completions]

    class Clock(TrainerCallback):
        """Processor seconds at the end of every step."""

        ends: ClassVar[list[float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.process_time())

    clock = Clock()
    settings = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, fp16=False, max_steps=1 + work.steps,
        per_device_train_batch_size=work.answers, gradient_accumulation_steps=1, num_generations=work.group,
        max_completion_length=work.tokens, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, loss_type="dapo", epsilon=0.2,
        epsilon_high=0.28, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to=[], shuffle_dataset=False,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": work.texts})
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=settings, train_dataset=data, processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    # The trainer draws before it says that a step begins: a step is from the end of the one before to its own end.
    return Speed(counted[1:], np.diff(clock.ends).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed into")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest prompt, about")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ends", type=float, default=10.0, help="how readily answers end")
    options = parser.parse_args()
    if options.trl is not None:
        # Behind everything else, so that only what is missing here comes from there.
        sys.path.append(str(options.trl))
    try:
        import trl as _  # noqa: F401
    except ImportError:
        raise SystemExit(
            "TRL is not installed; pip install --no-deps --target FOLDER trl==1.16.0 accelerate==1.15.0, "
            "then give --trl FOLDER"
        ) from None
    torch.set_num_threads(1)
    shape = load_config(ROOT / "configs" / "quickstart.yaml").model.architecture
    assert shape is not None
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    sources = [p.read_text(encoding="utf-8") for p in library]
    tokenizer = train_bpe(sources, shape.vocab_size)
    chance = np.random.default_rng(0)
    lengths = chance.integers(options.longest // 4, options.longest, size=options.prompts).tolist()
    long = [s for s in sources if len(s) > 10_000]
    texts = [tokenizer.decode(tokenizer.encode(s)[100 : 100 + n]) for s, n in zip(long, lengths, strict=False)]
    assert len(texts) == options.prompts, "fewer long files in the standard library than prompts"
    work = Work(texts, options.group, options.tokens, options.steps)
    with tempfile.TemporaryDirectory() as temporary, initialize() as parallel:
        folder = Path(temporary)
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        facts = shape.to_hf() | {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
        with torch.no_grad():
            # The row of a padding token is made of zeros.
            rows = model.get_input_embeddings().weight
            rows[tokenizer.eos_id] = options.ends * rows.std() * torch.randn(rows.size(1))
        model.save_pretrained(folder / "hf")
        import_hf(folder / "hf", folder / "checkpoint")
        tokenizer.save(folder / "tokenizer")
        for file in (folder / "tokenizer").iterdir():
            file.rename(folder / "hf" / file.name)
        mine = ours(work, folder / "checkpoint", shape, tokenizer, parallel)
        theirs = trl(work, folder / "hf", folder)
    ratio = mine.rate / theirs.rate
    met = "met" if ratio >= TARGET else "MISSED"
    print(
        f"{shape.parameter_count / 1e6:.1f} M parameters, {options.prompts} prompts x {options.group} answers "
        f"of at most {options.tokens} tokens, {options.steps} steps, ends x {options.ends:g}\n"
        f"ours {mine.tokens} tokens, {mine.rate:.0f} per second; TRL {theirs.tokens} tokens, {theirs.rate:.0f} per "
        f"second: {ratio:.2f}x (target {TARGET}: {met})\n"
        f"fastest step: ours {mine.best:.0f} per second, TRL {theirs.best:.0f}: {mine.best / theirs.best:.2f}x"
    )


if __name__ == "__main__":
    main()
