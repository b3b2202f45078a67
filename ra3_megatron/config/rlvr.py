"""Settings of RLVR: reinforcement learning with programs judged by tests."""

from dataclasses import dataclass
from typing import Literal

from ra3_megatron.config.data import _at_least, _one_of
from ra3_megatron.config.draws import check_draw_ahead, draw_steps
from ra3_megatron.config.errors import UserError


@dataclass(frozen=True)
class RlvrConfig:
    """Reinforcement learning with verifiable rewards, after mid-training; GRPO as in DeepCoder.

    A step draws `group_size` answers to each of `prompts_per_step` tasks, has them judged, and updates the policy.
    """

    steps: int = 0
    """Steps; 0 = no such stage."""
    start: str | None = None
    """`ra3 rlvr` alone: a checkpoint folder, or a run folder of ours, to start from; none = `model.source`, or the base
    made here."""
    start_arm: str | None = None
    """With a run folder as `start`: the arm whose last checkpoint is meant; none = the run's first."""
    tasks: str | None = None
    """File of tasks, or folder that holds it under its usual name; none = the data set's repository on the hub."""
    layout: Literal["tasks", "mbpp_train", "acecode", "deepcoder", "areal", "livecodebench"] = "tasks"
    """Layout of `tasks`: ours (docs/rlvr.md), MBPP's training and validation parts, AceCode-87K, DeepCoder-Preview,
    AReaL-boba-2, LiveCodeBench."""
    max_tasks: int | None = None
    """Tasks read at most, in the file's order; none = all."""
    longest_reference: int | None = None
    """Characters of a task's own reference at most: easy tasks have short ones. none = any, also without one."""
    validation_tasks: int = 32
    """Tasks held out and measured before, during and after; the same for every seed. 0 = none."""
    validation_samples: int = 1
    """Answers to each of them per measurement, with the same random numbers every time."""
    eval_interval: int = 0
    """Steps between measurements of the held-out tasks; 0 = only before the first and after the last."""
    unfit_tasks: Literal["drop", "error"] = "drop"
    """Tasks that cannot be trained on: prompt without room, tests that must share a process with the program, tests
    that fail on the task's own reference. `drop` and count them, or refuse to start."""
    prompt: Literal["completion", "chat"] = "completion"
    """`completion`: the text that base models go on with, as in the evaluation. `chat`: a request in the chat template
    of the model's tokenizer; the program is taken out of the answer. Thoughts (comments) are part of an answer."""
    mbpp_prompt: Literal["few_shot", "docstring"] = "docstring"
    """MBPP in completion form: three solved problems in front, or a docstring."""
    template: str = "{prompt}"
    """What is put around the text of `prompt`; must hold `{prompt}`."""
    start_token: Literal["hf", "auto", "bos", "eos", "none"] = "auto"
    """Token before a prompt in completion form, as in data.tokenizer.start_token; `hf`: whatever the tokenizer puts
    there when `transformers` uses it."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside those of the prompt's form and the tokenizer's end of text; they are no part of
    the program."""
    prompts_per_step: int = 32
    """Tasks per step over all replicas; a multiple of replicas x `minibatches`."""
    group_size: int = 8
    """G: answers to a task; the others are the baseline of each, so at least 2."""
    temperature: float = 1.0
    """Divides the logits, when sampling and when training."""
    max_tokens: int = 256
    """Tokens of an answer at most; prompt and answer must fit into `train.seq_length`."""
    reward: Literal["all", "fraction"] = "all"
    """1 for a program that passes every test and 0 for others, or the fraction of tests passed."""
    advantage: Literal["normalised", "centred", "leave_one_out"] = "normalised"
    """Reward less the group's mean, over its standard deviation (GRPO); without the division (Dr. GRPO); or less the
    mean of the group's others (RLOO)."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "token_mean"
    """Loss of a step: mean over answers of the mean over their tokens (GRPO), mean over all tokens (DAPO), or sum over
    tokens divided by answers x `max_tokens` (Dr. GRPO)."""
    correction: Literal["clip", "decoupled", "truncate"] = "clip"
    """For answers of older weights: clip current/behaviour as PPO does; clip current/proximal, with the proximal
    policy's log-probs taken before the update, and weight with proximal/behaviour, truncated (decoupled objective, one
    forward pass more); or weight with current/behaviour, truncated."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high (clip-higher)."""
    dual_clip: float | None = None
    """Upper bound of the loss at negative advantages, in multiples of |advantage|; none = unbounded."""
    max_importance_weight: float = 2.0
    """Largest weight; for `decoupled` and `truncate`."""
    overlong: Literal["mask", "keep", "soft"] = "mask"
    """Answers cut at `max_tokens`: left out of the loss (their rewards count in the group's mean); treated like others;
    or kept with a price that rises from 0 to 1 over the last `overlong_buffer` tokens (DAPO's soft punishment)."""
    overlong_buffer: int = 0
    """Tokens before `max_tokens` from which `soft` takes off reward; `soft` needs at least 1."""
    max_refills: int = 3
    """Rounds in which tasks whose answers all earned the same are replaced by the next ones of the data (dynamic
    sampling); what is still flat after the last is left out. 0 = no replacement."""
    kl_coefficient: float = 0.0
    """Weight of the divergence from the weights the stage starts from; above 0 a frozen copy is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of that divergence at the sampled tokens (`algo/losses.reference_kl`)."""
    max_lag: int = 0
    """Largest number of steps between an answer and its use: answers of max_lag + 1 steps are drawn at once, unless
    `draw_ahead`."""
    draw_ahead: bool = False
    """Draw the answers of the next (max_lag + 1) / 2 steps, at once, before the steps before them are trained: what
    replicas that only generate need (`parallel.generation_replicas`). max_lag must be odd."""
    minibatches: int = 1
    """Optimizer updates that a step's tasks are divided over."""
    lr: float = 1.0e-6
    """Learning rate, constant after the warm-up; the other optimizer settings are those of `optimizer`."""
    warmup_steps: int = 0
    """Optimizer updates of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay, in place of `optimizer.weight_decay`."""
    share_prompts: bool | None = None
    """Whether the update computes a prompt once for several answers to it instead of once for each; speed only: the
    loss is the same to rounding. none = with torch layers, whose attention can; Transformer Engine's cannot."""
    checkpoint_interval: int = 5
    """Steps between checkpoints; answers and verdicts since the last one are read back, not made again."""

    def __post_init__(self) -> None:
        least = {
            "steps": 0, "max_tasks": 1, "longest_reference": 1, "validation_tasks": 0, "validation_samples": 1,
            "eval_interval": 0, "prompts_per_step": 1, "group_size": 2, "max_tokens": 1, "clip_low": 0, "clip_high": 0,
            "dual_clip": 1, "max_importance_weight": 1, "overlong_buffer": 0, "max_refills": 0, "kl_coefficient": 0,
            "max_lag": 0, "minibatches": 1, "warmup_steps": 0, "weight_decay": 0, "checkpoint_interval": 1,
        }  # fmt: skip
        for name, value in least.items():
            _at_least(f"rlvr.{name}", getattr(self, name), value)
        choices = {
            "unfit_tasks": ("drop", "error"),
            "reward": ("all", "fraction"),
            "advantage": ("normalised", "centred", "leave_one_out"),
            "aggregation": ("sequence_mean", "token_mean", "constant"),
            "correction": ("clip", "decoupled", "truncate"),
            "overlong": ("mask", "keep", "soft"),
            "kl_estimator": ("k1", "k2", "k3"),
        }
        for name, known in choices.items():
            _one_of(f"rlvr.{name}", getattr(self, name), known)
        self._check_together()

    @property
    def draw_steps(self) -> int:
        """Steps whose answers are drawn at once."""
        return draw_steps(self.max_lag, self.draw_ahead)

    def _check_together(self) -> None:
        check_draw_ahead("rlvr", self.max_lag, self.draw_ahead)
        if self.temperature <= 0:
            raise UserError(f"rlvr.temperature = {self.temperature}; it must be above 0; 1 samples as trained")
        if self.prompts_per_step % self.minibatches:
            raise UserError(
                f"rlvr.prompts_per_step = {self.prompts_per_step} is no multiple of rlvr.minibatches = "
                f"{self.minibatches}; every update needs as many tasks; change one of them"
            )
        if self.overlong == "soft" and not 1 <= self.overlong_buffer <= self.max_tokens:
            raise UserError(
                f"rlvr.overlong = soft and rlvr.overlong_buffer = {self.overlong_buffer}; the price needs room to rise "
                f"in; set the buffer to 1 up to rlvr.max_tokens = {self.max_tokens}"
            )
        if "{prompt}" not in self.template:
            raise UserError(
                f"rlvr.template = {self.template!r} lacks {{prompt}}, where the task's prompt goes; put it in"
            )
        if self.steps and (self.lr <= 0 or self.warmup_steps >= self.steps * self.minibatches):
            raise UserError(
                f"rlvr.lr = {self.lr} and rlvr.warmup_steps = {self.warmup_steps}; the rate must be above 0 and the "
                f"warm-up shorter than the {self.steps * self.minibatches} updates"
            )
        if self.steps and self.tasks is None and self.layout == "tasks":
            raise UserError(f"rlvr.steps = {self.steps} and rlvr.tasks is empty; name the file of tasks to train on")
