"""The sections of a run's configuration but `data`: plain frozen dataclasses, no torch.

Every field says its unit and its effect; `ra3_megatron.config.run` loads and overrides them,
`ra3_megatron.config.validate` checks them against one another.
"""

from dataclasses import dataclass
from typing import Literal

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import ARMS


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and in which numbers."""

    source: str | None = None
    """Hugging Face folder or GGUF file of the base model; none = random weights in the shape of `architecture`."""
    architecture: Architecture | None = None
    """Shape of the model. With a `source` it may be left out; when given, it must equal the source's."""
    init_std: float = 0.02
    """Standard deviation of random initial weights (used only without `source`)."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Numbers of the forward and backward pass; bf16 and fp8 keep fp32 master weights."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = "tensorwise"
    """Scaling recipe of Transformer Engine, read only when precision is fp8: one scale per tensor, from the steps
    before (delayed) or from the tensor itself (tensorwise); one per 128 values (blockwise, Hopper), per 32 (mxfp8) or
    per 16 values of four bits (nvfp4), both Blackwell. docs/gpu.md says which to choose."""
    fp8_format: Literal["auto", "hybrid", "e4m3"] = "auto"
    """Eight-bit numbers: hybrid has gradients in E5M2 (wide range) and the rest in E4M3, e4m3 has all in E4M3; auto is
    what the recipe was published with: hybrid for delayed and tensorwise, e4m3 for blockwise and mxfp8."""
    fp8_params: bool = False
    """Keep the weights of FP8 layers in FP8 alone and gather them over the replicas in FP8: 1 byte per weight instead
    of 2 and its FP8 copy. The fp32 master weights of the optimizer stay. Not with mxfp8 and nvfp4."""
    fp8_amax_history: int = 1024
    """Micro-batches whose largest values the delayed recipe remembers; read by that recipe alone."""
    fp8_amax_algo: Literal["max", "most_recent"] = "max"
    """Which of the remembered values makes the delayed recipe's next scale."""
    bf16_layers_at_start: int = 0
    """First transformer layers that compute in BF16 when precision is fp8; not with the delayed recipe."""
    bf16_layers_at_end: int = 0
    """Last transformer layers that compute in BF16, likewise."""
    fp8_health_interval: int = 50
    """Steps between records of the largest value, scale and overflows of the FP8 tensors per group of layers; 0 = none.
    Read only when precision is fp8."""
    fp8_probe_interval: int = 500
    """Steps between measurements of the loss of one micro-batch in FP8 and in BF16 on the same weights, before the step
    that trains on it; 0 = none. One costs two forward passes. The first is at step 1 (delayed has no scales then: an
    interval later). Read only when precision is fp8."""
    fp8_probe_limit: float = 0.02
    """Largest relative difference of the two losses; beyond it the run stops. Infinity (.inf) = only log it."""
    layers: Literal["auto", "te", "local"] = "auto"
    """Layer implementation: Transformer Engine, torch, or whichever this machine has (logged at start)."""
    vocab_multiple: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size, rows."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of `recompute_modules`, or whole layers."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Parts of a layer whose activations selective recompute makes again: core_attn (pays with torch's attention on
    long windows only; Transformer Engine's keeps no scores), mlp; moe in layers with experts."""
    recompute_layers: int | None = None
    """Layers of each pipeline stage that full recompute makes again one by one, the others keep their activations;
    none = all of them."""
    offload_layers: int = 0
    """First transformer layers whose activations wait for the backward pass in the host's memory; 0 = none. Needs
    Transformer Engine's layers and neither pipeline nor recompute."""
    deterministic: bool = False
    """Add up in a fixed order on a GPU too, as a CPU always does: a resumed run equals an uninterrupted one bit for
    bit. Costs speed; docs/gpu.md says what else it needs."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes; data-parallel size is what the world leaves over."""

    tensor: int = 1
    """Processes that share every matrix."""
    pipeline: int = 1
    """Processes that hold consecutive groups of layers."""
    virtual_pipeline: int | None = None
    """Groups of layers per pipeline process (interleaved schedule); none = one."""
    context: int = 1
    """Processes that share every sequence."""
    data: int | None = None
    """Expected number of replicas; none = world size / (tensor x pipeline x context)."""
    generation_replicas: int = 0
    """Replicas that only generate while the others train, in the stages `variational` and `rlvr`, which need
    `draw_ahead`: the last ones. 0 = in these stages too every replica does both. Other stages use all."""
    sequence: bool = False
    """Shard norms and dropout along the sequence over the tensor-parallel processes; needs tensor > 1."""
    expert: int = 1
    """Processes that deal the experts of a layer out among themselves, out of the tensor x context x data ones that
    hold the layer; neighbours in this order, so that with expert_tensor x expert <= tensor they are one replica's."""
    expert_tensor: int | None = None
    """Processes that share every matrix of an expert, a divisor of tensor; none = all tensor-parallel ones."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs overlap_grad_reduce."""
    timeout_s: float = 600.0
    """Deadline of every collective, seconds; past it the run ends with the name of the missing rank."""
    setup_timeout_s: float = 86400.0
    """Deadline of what one process does for all (preparing the corpus, conversion) while the others wait, seconds."""
    threads: int | None = None
    """CPU threads per process; none = cores / processes on the node (OMP_NUM_THREADS wins when set)."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and batches of a training stage. Batch sizes are in sequences (packed windows)."""

    seq_length: int = 512
    """Tokens of one packed window."""
    micro_batch_size: int = 1
    """Windows a replica takes through the model at once."""
    global_batch_size: int = 8
    """Windows per optimizer step over all replicas."""
    steps: int | None = None
    """Optimizer steps; exactly one of steps, tokens, epochs is set."""
    tokens: int | None = None
    """Tokens (padding included) of the corpus without thoughts to train on; rounded up to whole steps. With thoughts
    the same code takes more windows, and so proportionally more steps."""
    epochs: float | None = None
    """Passes over the packed corpus; rounded up to whole steps."""
    eval_interval: int = 0
    """Steps between measurements of validation loss; 0 = only before the first and after the last step."""
    eval_windows: int = 64
    """Windows of the validation split per measurement; rounded up to whole global batches."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient norm ends the run, or the step is skipped and counted."""
    max_skipped_steps: int = 10
    """Skipped steps in a row after which the run stops all the same."""
    loss_on: Literal["all", "code"] = "all"
    """Tokens of the bootstrapped set that the M-step learns to predict: thoughts and code, or code alone."""
    init: Literal["base", "policy"] = "base"
    """Weights the M-step starts from: those the round began with, or those of q after the E-step."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape after the warm-up; WSD holds the peak and decays over the last `decay_fraction`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """Share of the steps that WSD decays over."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norms are exempt."""
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient; 0 = no clipping."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    interval: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 = none."""
    async_save: bool = True
    """Write in the background while training goes on; drained before the run ends."""
    verify: bool = True
    """Compare a hash of the parameters after loading with the one taken at saving."""
    timeout_s: float = 1800.0
    """Deadline for one save to finish, seconds."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (extra `wandb`)."""

    project: str = "ra3"
    """Project name."""
    entity: str | None = None
    """Team or user; none = the account's default."""
    mode: Literal["online", "offline"] = "online"
    """Whether figures are uploaded as they come."""


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow (extra `mlflow`)."""

    tracking_uri: str = "mlruns"
    """Server or folder."""
    experiment: str = "ra3"
    """Experiment name."""


@dataclass(frozen=True)
class ReportConfig:
    """What is logged, and where to."""

    interval: int = 10
    """Steps between log lines and metric records."""
    tensorboard: bool = True
    """Write TensorBoard event files beside `metrics.jsonl`."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases too."""
    mlflow: MlflowConfig | None = None
    """Log to MLflow too."""


@dataclass(frozen=True)
class ExportConfig:
    """The trained model as a Hugging Face folder at the end of the run."""

    enabled: bool = True
    """Write `<run>/<nn>-export/hf`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the exported weights."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, GB."""


@dataclass(frozen=True)
class RunSection:
    """Identity of the run."""

    dir: str = "runs/run"
    """Run folder; relative to the working folder. Every command on the same folder goes on where it stopped."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    arms: tuple[str, ...] = ("ra3",)
    """What is mid-trained, one after the other from the same base on the same corpus: `ra3`, and the baselines `ntp`
    (next-token prediction), `self_comment` (thoughts of the base model), `bolt` (its thoughts, resampled by importance
    weight), `brite` (one reward for the whole snippet). The first is the one that is exported. None: RLVR alone, which
    `ra3 rlvr` makes of every configuration."""
    rounds: int = 1
    """EM rounds: variational update, rationale generation and fine-tuning, each from the last one's weights."""

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or len(set(self.arms)) != len(self.arms):
            raise UserError(f"run.arms = {list(self.arms)}; give one or more of {', '.join(ARMS)}, each once")
        if self.rounds < 1:
            raise UserError(f"run.rounds = {self.rounds}; it must be at least 1")
