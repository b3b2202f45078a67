"""Cross-field checks and the arithmetic of batches and processes, before anything is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.experts import ExpertSizes, check_expert_rollouts, check_expert_split, expert_replicas
from ra3_megatron.config.precision import check_fp8_tokens, check_precision
from ra3_megatron.config.ra3 import THINKING_ARMS
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.sections import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """How the world divides, and what one step is made of."""

    world: int
    """Processes."""
    tensor: int
    pipeline: int
    context: int
    data: int
    """Replicas: world / (tensor x pipeline x context)."""
    micro_batches: int
    """Micro-batches per replica and step."""
    tokens_per_step: int
    """Tokens of one optimizer step, padding included."""
    padded_vocab: int
    """Rows of the embedding after padding."""
    expert: int = 1
    """Processes that deal the experts out."""
    expert_tensor: int = 1
    """Processes that share an expert's matrices."""
    expert_data: int = 1
    """Processes that hold the same experts: tensor x context x data / (expert_tensor x expert)."""
    generating: int = 0
    """Of the replicas, those that only generate in the stages `variational` and `rlvr`."""

    @property
    def sequence_multiple(self) -> int:
        """Every packed sequence is padded to a multiple of this, so that context parallelism can split it evenly."""
        return sequence_multiple(self.context)


def sides(layout: Layout) -> str:
    """Who trains and who generates where some replicas only do that, in words."""
    training, replica = layout.data - layout.generating, layout.world // layout.data
    first = training * replica
    return (
        f"variational, rlvr: replicas that train {training} (processes 0-{first - 1}), that generate "
        f"{layout.generating} ({first}-{layout.world - 1})"
    )


def sequence_multiple(context: int) -> int:
    """Multiple that sequences are padded to for `context` context-parallel processes, tokens."""
    return 2 * context if context > 1 else 1


def padded_vocab_size(vocab: int, multiple: int, tensor: int) -> int:
    """Smallest multiple of `multiple * tensor` that holds `vocab` rows; rows past `vocab` are padding."""
    if min(vocab, multiple, tensor) < 1:
        raise UserError(f"vocabulary {vocab}, multiple {multiple} and tensor {tensor} must be at least 1")
    return _round_up(vocab, multiple * tensor)


def resolve_layout(config: RunConfig, world: int, architecture: Architecture, splits: bool = True) -> Layout:
    """Check every rule that joins fields and return the arithmetic.

    `splits`: whether the world runs stages that `parallel.generation_replicas` divides; where it runs others alone,
    that is no matter. Raises UserError naming the fields, the values found and the fix.
    """
    p, t = config.parallel, config.train
    for section, name in _at_least_one:
        if getattr(getattr(config, section), name) < 1:
            raise UserError(f"{section}.{name} is {getattr(getattr(config, section), name)}; it must be at least 1")
    if config.run.arms:
        _check_train_length(config)
    _check_optimizer(config)
    data = replicas(p, world)
    generating = _check_generation(config, data) if p.generation_replicas and splits else 0
    shares = {"replicas": data}
    if p.generation_replicas:
        shares = {"training replicas": data - generating, "generating replicas": generating} if splits else {}
    _check_ra3(config, shares)
    _check_rlvr(config, shares)
    check_model_split(p, architecture)
    check_expert_rollouts(config)
    check_precision(config.model, p, architecture)
    _check_windows(config, architecture)
    if t.global_batch_size % (t.micro_batch_size * data):
        raise UserError(
            f"train.global_batch_size ({t.global_batch_size}) is not a multiple of train.micro_batch_size "
            f"({t.micro_batch_size}) x {data} replicas; use {_round_up(t.global_batch_size, t.micro_batch_size * data)}"
        )
    micro_batches = t.global_batch_size // (t.micro_batch_size * data)
    if p.virtual_pipeline and micro_batches % p.pipeline:
        raise UserError(
            f"the interleaved schedule needs micro-batches per step ({micro_batches}) to be a multiple of "
            f"parallel.pipeline ({p.pipeline}); change train.global_batch_size or leave parallel.virtual_pipeline out"
        )
    layout = Layout(
        world=world,
        tensor=p.tensor,
        pipeline=p.pipeline,
        context=p.context,
        data=data,
        micro_batches=micro_batches,
        tokens_per_step=t.global_batch_size * t.seq_length,
        padded_vocab=padded_vocab_size(architecture.vocab_size, config.model.vocab_multiple, p.tensor),
        expert=p.expert,
        expert_tensor=p.expert_tensor or p.tensor,
        expert_data=expert_replicas(p, data),
        generating=generating,
    )
    if config.run.arms and t.epochs is None:
        total_steps(config, layout, windows=0)
    return layout


_at_least_one = (
    ("parallel", "tensor"),
    ("parallel", "pipeline"),
    ("parallel", "context"),
    ("train", "seq_length"),
    ("train", "micro_batch_size"),
    ("train", "global_batch_size"),
    ("train", "eval_windows"),
    ("train", "max_skipped_steps"),
    ("model", "vocab_multiple"),
    ("checkpoint", "interval"),
    ("checkpoint", "keep_last"),
    ("report", "interval"),
)


def _round_up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit


def _check_train_length(config: RunConfig) -> None:
    t = config.train
    given = {name: getattr(t, name) for name in ("steps", "tokens", "epochs") if getattr(t, name) is not None}
    if len(given) != 1:
        found = ", ".join(f"train.{k}={v}" for k, v in given.items()) or "none of them"
        raise UserError(f"exactly one of train.steps, train.tokens, train.epochs sets the length; found {found}")
    (name, value), *_ = given.items()
    if value <= 0:
        raise UserError(f"train.{name} is {value}; it must be positive")


def _check_optimizer(config: RunConfig) -> None:
    o, p = config.optimizer, config.parallel
    if o.lr <= 0 or o.min_lr < 0 or o.min_lr > o.lr:
        raise UserError(f"optimizer.lr {o.lr} and min_lr {o.min_lr}: need 0 <= min_lr <= lr and lr > 0")
    if not 0 < o.decay_fraction <= 1:
        raise UserError(f"optimizer.decay_fraction is {o.decay_fraction}; it is a share of the steps in (0, 1]")
    if o.warmup_steps < 0 or o.clip_grad < 0:
        raise UserError("optimizer.warmup_steps and optimizer.clip_grad must not be negative")
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        raise UserError("parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true")
    if p.timeout_s <= 0 or config.checkpoint.timeout_s <= 0:
        raise UserError("parallel.timeout_s and checkpoint.timeout_s must be positive seconds")


def _check_generation(config: RunConfig, data: int) -> int:
    """Replicas that only generate, out of `data`."""
    count = config.parallel.generation_replicas
    found = f"parallel.generation_replicas is {count}"
    if not 0 < count < data:
        raise UserError(
            f"{found} of {data} replicas; both sides need one: start {count + 1} replicas or more, or lower it to 0"
        )
    stages = {"variational": bool({"ra3", "brite"} & set(config.run.arms)), "rlvr": config.rlvr.steps > 0}
    if not any(stages.values()):
        raise UserError(f"{found}, and no stage of this run would use them (variational, rlvr); set it to 0")
    for name, there in stages.items():
        if there and not getattr(config, name).draw_ahead:
            raise UserError(
                f"{found} and {name}.draw_ahead is false; one side would always wait for the other; set "
                f"{name}.draw_ahead=true and {name}.max_lag to an odd number, or parallel.generation_replicas to 0"
            )
    if config.model.precision == "fp8" and (config.model.fp8_recipe == "delayed" or config.model.fp8_params):
        raise UserError(
            f"{found} and model.fp8_recipe is {config.model.fp8_recipe}, fp8_params {config.model.fp8_params}; scaling "
            "factors of earlier steps and FP8 copies stay with those that train; use another recipe than delayed, and "
            "fp8_params=false"
        )
    if config.parallel.expert > 1:
        raise UserError(
            f"{found} and parallel.expert is {config.parallel.expert}; experts are dealt out over replicas, which are "
            "on different sides then; set one of them to its default"
        )
    return count


def _check_ra3(config: RunConfig, shares: Mapping[str, int]) -> None:
    if config.base.tokens and config.model.source is not None:
        raise UserError(
            f"base.tokens is {config.base.tokens} and model.source is {config.model.source}; a base model is brought "
            "along or made here; set one of them"
        )
    room, length = config.train.seq_length, config.data.snippet_tokens
    if length is not None and length > room:
        raise UserError(f"data.snippet_tokens ({length}) exceeds train.seq_length ({room}); lower it")
    _check_format(config)
    thinking = [arm for arm in config.run.arms if arm in THINKING_ARMS]
    if not thinking:
        return
    _check_rollouts(config)
    if config.model.source is None and not config.base.tokens:
        raise UserError(
            f"run.arms has {thinking[0]}, but neither model.source nor base.tokens is set; thoughts come from a "
            "language model: bring one, or have one trained first"
        )
    if config.data.validation_fraction == 0:
        raise UserError(
            f"run.arms has {thinking[0]} and data.validation_fraction is 0; arms are measured on it: raise it"
        )
    if config.parallel.context > 1:
        raise UserError(
            f"run.arms has {thinking[0]} and parallel.context is {config.parallel.context}; the rollout engine's cache "
            "is not split along the sequence; set parallel.context to 1"
        )
    for who, count in shares.items():
        if config.variational.snippets_per_step % count:
            raise UserError(
                f"variational.snippets_per_step ({config.variational.snippets_per_step}) is not a multiple of the "
                f"{count} {who}; use {_round_up(config.variational.snippets_per_step, math.lcm(*shares.values()))}"
            )


def _check_rollouts(config: RunConfig) -> None:
    p = config.parallel
    if config.latent.engine == "vllm" and p.tensor * p.pipeline * p.expert > 1:
        raise UserError(
            f"latent.engine is vllm, parallel.tensor {p.tensor}, pipeline {p.pipeline} and expert {p.expert}; vLLM "
            "gets the weights whole; set all to 1, or latent.engine=megatron"
        )
    if config.latent.cuda_graphs and p.tensor * p.pipeline > 1:
        raise UserError(
            f"latent.cuda_graphs is true, parallel.tensor {p.tensor} and pipeline {p.pipeline}; passes of several "
            "processes are not captured; set both to 1, or leave latent.cuda_graphs out"
        )


def _check_rlvr(config: RunConfig, shares: Mapping[str, int]) -> None:
    r, p = config.rlvr, config.parallel
    if not r.steps:
        if not config.run.arms:
            raise UserError("run.arms is empty and rlvr.steps is 0; nothing would be trained; set one of them")
        return
    if r.start is not None and (config.run.arms or config.model.source is not None or config.base.tokens):
        raise UserError(
            f"rlvr.start is {r.start}, but the run has arms, model.source or base.tokens, which RLVR would start from; "
            "leave rlvr.start out, or use ra3 rlvr without the other two"
        )
    if not config.run.arms and r.start is None and config.model.source is None and not config.base.tokens:
        raise UserError(
            "RLVR alone has nothing to start from; set model.source, rlvr.start (a checkpoint or run folder) or "
            "base.tokens"
        )
    units = {who: count * (1 if who.startswith("generating") else r.minibatches) for who, count in shares.items()}
    for who, unit in units.items():
        if r.prompts_per_step % unit:
            raise UserError(
                f"rlvr.prompts_per_step ({r.prompts_per_step}) is not a multiple of {unit} = {shares[who]} {who} x "
                f"{unit // shares[who]} updates (rlvr.minibatches); use "
                f"{_round_up(r.prompts_per_step, math.lcm(*units.values()))}"
            )
    if p.context > 1:
        raise UserError(
            f"rlvr.steps is {r.steps} and parallel.context is {p.context}; the rollout engine's cache is not split "
            "along the sequence; set parallel.context to 1"
        )
    _check_rollouts(config)
    if r.max_tokens >= config.train.seq_length:
        raise UserError(
            f"rlvr.max_tokens ({r.max_tokens}) leaves no room for a prompt in train.seq_length "
            f"({config.train.seq_length}); lower it, or raise that"
        )


def _check_format(config: RunConfig) -> None:
    """Settings that are about Python, for text that is not."""
    comments = {"data.comments": config.data.comments}
    if config.base.tokens:
        comments["base.comments"] = config.base.comments
    wrong = [name for name, value in comments.items() if value == "strip"]
    if config.latent.format == "tag" and (wrong or config.data.filters.syntax):
        found = [f"{name} is strip" for name in wrong] + ["data.filters.syntax is true"] * config.data.filters.syntax
        raise UserError(
            f"latent.format is tag and {', '.join(found)}; comments and syntax errors are found in Python only; set "
            "comments to keep_as_action and data.filters.syntax=false, or latent.format=comment for Python"
        )


class Sizes(ExpertSizes, Protocol):
    """Parallel sizes, from a configuration or in force."""

    @property
    def pipeline(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int | None: ...


def replicas(p: ParallelConfig, world: int) -> int:
    """Data-parallel size that `world` processes leave; raises UserError with the arithmetic when they do not fit."""
    replica = p.tensor * p.pipeline * p.context
    spelled = f"parallel.tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} = {replica}"
    if min(p.tensor, p.pipeline, p.context) < 1:
        raise UserError(f"parallel sizes must be at least 1; found {spelled}")
    if world % replica:
        raise UserError(
            f"{spelled} processes make one replica, but {world} were started; start a multiple of {replica} "
            f"(torchrun --nproc-per-node {replica}) or lower a size"
        )
    data = world // replica
    if p.data is not None and p.data != data:
        raise UserError(
            f"parallel.data is {p.data}, but {world} processes / ({spelled}) leaves {data}; "
            f"start {p.data * replica} processes or leave parallel.data out"
        )
    if p.sequence and p.tensor == 1:
        raise UserError("parallel.sequence is true with parallel.tensor 1; sequence sharding needs tensor > 1")
    if p.virtual_pipeline is not None and (p.virtual_pipeline < 2 or p.pipeline < 2):
        raise UserError(
            f"parallel.virtual_pipeline is {p.virtual_pipeline} with pipeline {p.pipeline}; both must be at least 2 "
            "(leave virtual_pipeline out for one group of layers per process)"
        )
    expert_replicas(p, data)
    return data


def check_model_split(p: Sizes, a: Architecture) -> None:
    """Raise UserError unless every dimension of the model divides over the processes that share it."""
    divisions = (
        ("model.architecture.num_heads", a.num_heads, "parallel.tensor", p.tensor),
        ("model.architecture.num_kv_heads", a.num_kv_heads, "parallel.tensor", p.tensor),
        # Of a mixture no layer has this width.
        ("model.architecture.ffn_hidden_size", 0 if a.num_experts else a.ffn_hidden_size, "parallel.tensor", p.tensor),
        ("model.architecture.hidden_size", a.hidden_size, "parallel.tensor", p.tensor),
        ("model.architecture.num_layers", a.num_layers, "parallel.pipeline", p.pipeline),
    )
    for what, value, by, size in divisions:
        if value % size:
            fitting = max(d for d in range(1, size + 1) if value % d == 0)
            raise UserError(f"{by} ({size}) does not divide {what} ({value}); the next size that does is {fitting}")
    chunks = p.pipeline * (p.virtual_pipeline or 1)
    if a.num_layers % chunks:
        raise UserError(
            f"parallel.pipeline ({p.pipeline}) x virtual_pipeline ({p.virtual_pipeline}) does not divide "
            f"model.architecture.num_layers ({a.num_layers}); lower parallel.virtual_pipeline"
        )
    check_expert_split(p, a)


def _check_windows(config: RunConfig, a: Architecture) -> None:
    p, t = config.parallel, config.train
    unit = sequence_multiple(p.context) * (p.tensor if p.sequence else 1)
    if t.seq_length % unit:
        raise UserError(
            f"train.seq_length ({t.seq_length}) is not a multiple of {unit} (2 x parallel.context"
            f"{' x parallel.tensor, sequence-parallel' if p.sequence else ''}); use {_round_up(t.seq_length, unit)}"
        )
    spelled = f"train.seq_length ({t.seq_length}) x micro_batch_size ({t.micro_batch_size})"
    check_fp8_tokens(config.model, p, t.seq_length * t.micro_batch_size, spelled)
    if t.seq_length > a.max_positions:
        raise UserError(
            f"train.seq_length ({t.seq_length}) exceeds the model's max_positions ({a.max_positions}); shorten it"
        )


def total_steps(config: RunConfig, layout: Layout, windows: int) -> int:
    """Optimizer steps of the stage for a packed corpus of `windows` windows.

    Raises UserError when the warm-up would take all of them.
    """
    t, warmup = config.train, config.optimizer.warmup_steps
    if t.steps is not None:
        steps = t.steps
    elif t.tokens is not None:
        steps = math.ceil(t.tokens / layout.tokens_per_step)
    else:
        assert t.epochs is not None
        steps = math.ceil(t.epochs * windows / t.global_batch_size)
    if warmup >= steps:
        raise UserError(
            f"optimizer.warmup_steps ({warmup}) leaves nothing of the {steps} steps that train.steps, tokens or epochs "
            "make; lower it or train longer"
        )
    return steps
