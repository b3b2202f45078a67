"""Settings of RA3 itself: how thoughts are written and sampled, the E-step, rationale generation, measurements."""

from dataclasses import dataclass
from typing import Literal

from ra3_megatron.config.data import _at_least
from ra3_megatron.config.draws import check_draw_ahead, draw_steps
from ra3_megatron.config.errors import UserError

ARMS = ("ra3", "ntp", "self_comment", "bolt", "brite")
"""What can be trained: RA3 and the baselines that share its code."""

THINKING_ARMS = ("ra3", "self_comment", "bolt", "brite")
"""Arms that draw thoughts, and so need a rollout engine."""


@dataclass(frozen=True)
class BaseConfig:
    """A base model made here, where none is brought along: next-token prediction from random weights."""

    tokens: int = 0
    """Tokens (padding included) of this training; 0 = no such stage. Refused together with `model.source`."""
    comments: Literal["strip", "keep_as_action"] = "keep_as_action"
    """Human comments of the corpus in this stage: a base model that never saw a comment would never think."""

    def __post_init__(self) -> None:
        _at_least("base.tokens", self.tokens, 0)


@dataclass(frozen=True)
class LatentConfig:
    """How a thought is written into the text, and how it is sampled."""

    format: Literal["comment", "tag"] = "comment"
    """`comment`: a line `# ...` before the code line. `tag`: `<think>...</think>`, for text that is not Python, decided
    at every line that is not blank; needs data.comments=keep_as_action and data.filters.syntax=false."""
    posterior: Literal["prefix", "hindsight"] = "prefix"
    """What q sees: the text so far, or the whole expert text in front of it as well."""
    max_latent_tokens: int = 32
    """Sampled tokens of a thought; a longer one is ended by force."""
    temperature: float = 1.0
    """Divides the logits of decisions and thoughts; their log-probabilities are after it."""
    chunk_tokens: int = 64
    """Most expert tokens of a row forced in by one forward pass; speed only."""
    max_batch: int = 64
    """Most rows of the rollout engine per replica; speed and memory of the key-value cache only."""
    cache_gib: float | None = None
    """Most memory of keys and values per process, GiB: fewer rows than `max_batch` where they do not fit; none = what
    `cache_share` says on a GPU, no limit on a CPU. Not for `vllm`. Speed only."""
    cache_share: float = 0.5
    """On a GPU, without `cache_gib`: share of the memory that is free when the engine is made which keys and values may
    take. Not for `vllm`. Speed only."""
    cuda_graphs: bool | None = None
    """Whether rollouts' passes of one token per row are captured as CUDA graphs: none = on a GPU, without tensor or
    pipeline parallelism and experts; true refuses to start where that is not so. Not for `vllm`. Speed only."""
    engine: Literal["megatron", "vllm"] = "megatron"
    """Where rollouts run: in the training model itself, or in vLLM (extra `vllm`, a GPU, no tensor or pipeline
    parallelism), which gets a copy of the weights after every update."""
    vllm_memory: float = 0.3
    """`vllm`: share of the GPU's memory that vLLM takes for its weights and cache; the rest is for training."""
    tokens_per_forward: int = 8192
    """Most new tokens of one forward pass of the rollout engine; speed and memory only."""

    def __post_init__(self) -> None:
        for name in ("max_latent_tokens", "chunk_tokens", "max_batch", "tokens_per_forward"):
            _at_least(f"latent.{name}", getattr(self, name), 1)
        for name in ("vllm_memory", "cache_share"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"latent.{name} = {getattr(self, name)}; it is a share; set a value between 0 and 1")
        if self.cache_gib is not None and self.cache_gib <= 0:
            raise UserError(f"latent.cache_gib = {self.cache_gib}; it must be above 0; none leaves it to cache_share")
        if self.temperature <= 0:
            raise UserError(f"latent.temperature = {self.temperature}; it must be above 0; 1 samples as trained")


SPEED_ONLY = (
    "chunk_tokens", "max_batch", "tokens_per_forward", "vllm_memory", "cache_gib", "cache_share", "cuda_graphs",
)  # fmt: skip
"""Fields of `LatentConfig` that do not change what is drawn."""


@dataclass(frozen=True)
class VariationalConfig:
    """The E-step: reinforcement learning of q, the policy that thinks (paper Eq. 4.1)."""

    steps: int = 50
    """Most optimizer steps; the stage ends earlier when the reward has flattened."""
    snippets_per_step: int = 32
    """Snippets per step over all replicas; a multiple of the replicas."""
    group_size: int = 8
    """G: rollouts of a snippet; the others are the baseline of each, so at least 2."""
    reward: Literal["mean", "sum", "gain"] = "mean"
    """l_t per token, per line, or per token less what the line has without its own thought."""
    horizon: int | None = 5
    """H: lines whose rewards count towards the return of a latent, its own included; none = all to the end."""
    discount: float = 1.0
    """gamma of the returns."""
    kl: Literal["constant", "bernoulli"] = "constant"
    """Cost of latents: `price` for each thought, or the divergence from the temporal-consistency prior."""
    price: float = 0.05
    """c, in the reward's unit; for `constant`."""
    stay: float = 0.9
    """alpha, the prior's probability of going on without a thought; for `bernoulli`."""
    log_latents: float | None = None
    """log|Z|, nats; `bernoulli` needs it."""
    scorer: Literal["frozen", "current"] = "frozen"
    """Which model scores the expert's lines: the round's starting weights, or the policy in training."""
    max_lag: int = 0
    """Largest number of updates between a rollout and its use: max_lag + 1 steps' rollouts are drawn at once, unless
    `draw_ahead`."""
    draw_ahead: bool = False
    """Draw the rollouts of the next (max_lag + 1) / 2 steps, at once, before the steps before them are trained: what
    replicas that only generate need (`parallel.generation_replicas`). max_lag must be odd."""
    correction: Literal["clip", "truncate"] = "clip"
    """For stale rollouts: clip the ratio current/behaviour as PPO does, or weight with the ratio, truncated."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low; for `clip`."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high; for `clip`."""
    max_importance_weight: float = 2.0
    """Largest weight; for `truncate`."""
    lr: float = 1.0e-4
    """Learning rate, constant after the warm-up; the other optimizer settings are those of `optimizer`."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    flat_window: int = 10
    """Steps averaged to see whether the reward still rises; 0 = never stop early."""
    flat_tolerance: float = 1.0
    """The stage ends when the last `flat_window` steps' mean reward, less what the same lines earn without any thought
    (which takes out how hard the snippets are), is not above the mean of as many steps before by this many standard
    errors of the difference."""
    checkpoint_interval: int = 5
    """Steps between checkpoints; rollouts since the last one are read back, not drawn again."""
    probe_snippets: int = 16
    """Snippets of the validation part rolled out before and after the stage with the same random numbers, for the
    reward's rise and the rationale viewer."""
    figure_discount: float = 0.9
    """gamma of the reported figure gamma-bar = mean gamma^tau."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("snippets_per_step", 1), ("group_size", 2), ("horizon", 1), ("max_lag", 0)):
            _at_least(f"variational.{name}", getattr(self, name), least)
        for name in ("warmup_steps", "flat_window", "probe_snippets", "price", "clip_low", "clip_high"):
            _at_least(f"variational.{name}", getattr(self, name), 0)
        _at_least("variational.checkpoint_interval", self.checkpoint_interval, 1)
        check_draw_ahead("variational", self.max_lag, self.draw_ahead)
        for name in ("discount", "figure_discount"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"variational.{name} = {getattr(self, name)}; it must lie between 0 and 1")
        if not 0 < self.stay < 1:
            raise UserError(f"variational.stay = {self.stay}; it is a probability; set a value between 0 and 1")
        if self.kl == "bernoulli" and self.log_latents is None:
            raise UserError(
                "variational.kl = bernoulli; variational.log_latents is empty; set log|Z| in nats, such as the usual "
                "length of a thought times the log of the vocabulary"
            )
        if self.lr <= 0 or self.warmup_steps >= self.steps:
            raise UserError(
                f"variational.lr = {self.lr} and warmup_steps = {self.warmup_steps}; the rate must be above 0 and the "
                f"warm-up shorter than the {self.steps} steps"
            )

    @property
    def draw_steps(self) -> int:
        """Steps whose rollouts are drawn at once."""
        return draw_steps(self.max_lag, self.draw_ahead)


@dataclass(frozen=True)
class GenerateConfig:
    """Rationale generation: z ~ q for every snippet of the corpus."""

    shard_snippets: int = 256
    """Snippets of one shard: what a replica writes, and finishes or loses, at a time."""
    bolt_samples: int = 4
    """K: samples per snippet of the arm `bolt`, of which one is kept by its importance weight."""

    def __post_init__(self) -> None:
        _at_least("generate.shard_snippets", self.shard_snippets, 1)
        _at_least("generate.bolt_samples", self.bolt_samples, 2)


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured on held-out code at the end of every arm."""

    snippets: int = 128
    """Snippets of the validation part, the same for every arm."""
    samples: int = 2
    """Rollouts of each with the model's own thoughts."""

    def __post_init__(self) -> None:
        _at_least("measure.snippets", self.snippets, 1)
        _at_least("measure.samples", self.samples, 1)
