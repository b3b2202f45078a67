"""What a run would be: resolved configuration, arithmetic of batches and processes, parameters, memory per rank."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ra3_megatron.checkpoint.manifest import ARCHITECTURE
from ra3_megatron.checkpoint.state import read_architecture
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import (
    GIB,
    OUTSIDE_OF_TORCH,
    Kernels,
    MemoryEstimate,
    cached_rows,
    estimate_memory,
    largest_micro_batch,
    parameters_per_rank,
)
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout, resolve_layout, sides
from ra3_megatron.parallel.launch import launch_from_env
from ra3_megatron.stages.start import start_checkpoint


def declared_architecture(config: RunConfig) -> tuple[Architecture, str]:
    """Shape of the model and where it was read: the source when it is on this machine, else the configuration.

    Raises UserError when neither says it, or when both do and differ.
    """
    m = config.model
    if config.rlvr.start is not None and not config.run.arms:
        start = start_checkpoint(config)
        return read_architecture(start / ARCHITECTURE), str(start)
    if m.source is None:
        if m.architecture is None:
            raise UserError("model.source and model.architecture are both unset; name a base model or give a shape")
        return m.architecture, "model.architecture (random weights)"
    source = Path(m.source)
    if not source.exists():
        if m.architecture is None:
            raise UserError(
                f"no base model at model.source {source}; put the Hugging Face folder or GGUF file there, "
                "or give model.architecture for a dry run without it"
            )
        return m.architecture, f"model.architecture ({source} is not on this machine)"
    from ra3_megatron.checkpoint.convert import open_source

    found = open_source(source).architecture()
    if m.architecture is not None and m.architecture != found:
        ours, theirs = m.architecture.to_dict(), found.to_dict()
        different = "; ".join(f"{k}: {ours[k]} here, {theirs[k]} in the source" for k in ours if ours[k] != theirs[k])
        raise UserError(f"model.architecture and {source} differ ({different}); correct it or leave it out")
    return found, str(source)


def default_world(config: RunConfig) -> tuple[int, str]:
    """Processes to reckon with: the launcher's, else those of `parallel.data`, else the fewest that fit."""
    launched = launch_from_env()
    p = config.parallel
    tensor = p.expert_tensor or p.tensor
    # Experts may be dealt out over the processes of several replicas.
    replica = p.pipeline * math.lcm(p.tensor * p.context, tensor * p.expert)
    if launched.source != "alone":
        return launched.world, f"from {launched.source}"
    if p.data is not None:
        return p.tensor * p.pipeline * p.context * p.data, "tensor x pipeline x context x data"
    return replica, "the fewest that fit; give --world-size for more"


def dry_run(config: RunConfig, world_size: int | None = None, memory_gib: float | None = None) -> None:
    """Print everything that can be known without building anything; raises UserError for what would not run.

    With `memory_gib`, a device's memory, also the largest micro-batch that fits there.
    """
    world, why = (world_size, "--world-size") if world_size else default_world(config)
    architecture, where = declared_architecture(config)
    layout = resolve_layout(config, world, architecture)
    console = Console(soft_wrap=True, highlight=False)
    console.print("[bold]# resolved configuration[/bold]")
    console.print(config.to_yaml(), markup=False)
    console.print(_table(config, architecture, where, layout, why, memory_gib))


def _table(config: RunConfig, a: Architecture, where: str, layout: Layout, why: str, memory_gib: float | None) -> Table:
    t = config.train
    table = Table(show_header=False, title="dry run: nothing was started", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("model", f"{a.family}, {a.parameter_count:,} parameters, from {where}"),
        *_expert_rows(a, layout),
        ("vocabulary", f"{a.vocab_size:,} padded to {layout.padded_vocab:,} rows"),
        (
            "processes",
            f"{layout.world} ({why}) = tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} "
            f"x data {layout.data}",
        ),
        (
            "batch",
            f"{t.global_batch_size} windows = micro-batch {t.micro_batch_size} x data {layout.data} "
            f"x {layout.micro_batches} micro-batches",
        ),
        ("tokens per step", f"{layout.tokens_per_step:,} = {t.global_batch_size} windows x {t.seq_length} tokens"),
        ("length", _length(config, layout)),
        *_split_rows(config, layout),
        *_rlvr_rows(config, layout),
        *_rollout_rows(config, a, layout),
        (
            "compute",
            f"{a.flops_per_token(t.seq_length / 2) * layout.tokens_per_step:.3e} FLOPs per step "
            f"(forward and backward, windows counted as one snippet)",
        ),
        ("parameters per stage", ", ".join(f"{n:,}" for n in parameters_per_rank(a, layout))),
        *_memory_rows(config, a, layout, memory_gib),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _memory_rows(config: RunConfig, a: Architecture, layout: Layout, memory_gib: float | None) -> list[tuple[str, str]]:
    """The memory estimate, term by term, and the largest micro-batch for a device's memory."""
    memory = estimate_memory(config, a, layout)
    te = Kernels.expected(config).te
    rows = [
        (
            "memory, fullest rank",
            f"{memory.total / 2**30:.2f} GiB = {_terms(memory)} (estimate, "
            f"{'Transformer Engine' if te else 'torch'} layers, model.recompute {config.model.recompute})",
        )
    ]
    if memory_gib is not None:
        windows = largest_micro_batch(config, a, layout, int(memory_gib * 2**30))
        reserve = f"{OUTSIDE_OF_TORCH / 2**30:.0f} GiB left to the device's context and libraries"
        says = f"train.micro_batch_size {windows}" if windows else "none; not even a micro-batch of one window"
        rows.append((f"fits into {memory_gib:g} GiB", f"{says} ({reserve})"))
    return rows


def _terms(memory: MemoryEstimate) -> str:
    """What the total is made of; terms of nothing are left out."""
    around = {"logits": memory.logits}
    if memory.recomputed:
        around = {"the larger of logits": memory.logits, "and of a layer computed anew": memory.recomputed}
    terms = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations")}
    terms |= {"second model": memory.frozen, "key-value cache": memory.cache}
    held = " + ".join(f"{name} {value / 2**30:.2f}" for name, value in terms.items() if value)
    return f"{held} + {' '.join(f'{name} {value / 2**30:.2f}' for name, value in around.items())}"


def _expert_rows(a: Architecture, layout: Layout) -> list[tuple[str, str]]:
    """Arithmetic of a mixture of experts."""
    if not a.num_experts:
        return []
    stage = layout.tensor * layout.context * layout.data
    return [
        (
            "experts",
            f"{a.num_experts} a layer, {a.experts_per_token} of them per token "
            f"({a.parameter_count - a.inactive_parameters:,} parameters active); {a.num_experts // layout.expert} on a "
            "process",
        ),
        (
            "expert parallel",
            f"{stage} processes of a stage = tensor {layout.tensor} x context {layout.context} x data {layout.data} "
            f"= expert-tensor {layout.expert_tensor} x expert {layout.expert} x expert-data {layout.expert_data}",
        ),
    ]


def _split_rows(config: RunConfig, layout: Layout) -> list[tuple[str, str]]:
    """Who trains and who generates, where some replicas only do that."""
    if not layout.generating:
        return []
    count = _per_replica(config.variational.snippets_per_step, "snippets", layout)
    return [("split", sides(layout) + (f"; {count}" if "ra3" in config.run.arms or "brite" in config.run.arms else ""))]


def _per_replica(count: int, what: str, layout: Layout) -> str:
    """Shares of a step, e.g. `4 tasks per replica and step`."""
    if not layout.generating:
        return f"{count // layout.data} {what} per replica and step"
    training = layout.data - layout.generating
    return (
        f"{count // training} {what} per training replica and step, {count // layout.generating} per generating replica"
    )


def _rlvr_rows(config: RunConfig, layout: Layout) -> list[tuple[str, str]]:
    """Arithmetic of RLVR's steps."""
    r = config.rlvr
    if not r.steps:
        return []
    answers = r.prompts_per_step * r.group_size
    return [
        (
            "RLVR",
            f"{r.steps:,} steps x {r.prompts_per_step} tasks x {r.group_size} answers = {r.steps * answers:,} answers "
            f"of at most {r.max_tokens} tokens, up to {r.max_refills} refills; "
            f"{_per_replica(r.prompts_per_step, 'tasks', layout)}, {r.minibatches} updates per step, lag up to "
            f"{r.max_lag}, answers of {r.draw_steps} steps drawn at once",
        ),
    ]


def _rollout_rows(config: RunConfig, a: Architecture, layout: Layout) -> list[tuple[str, str]]:
    """Rows of the rollout engine, and what their keys and values take."""
    latent, tokens = config.latent, config.train.seq_length
    rows, row = cached_rows(config, a, layout)
    if not rows:
        return []
    text = f"{rows * row / GIB:.2f} GiB of keys and values per process at most = {rows} rows x {tokens} tokens "
    if latent.cache_gib is not None:
        return [("rollouts", f"{text}(latent.max_batch {latent.max_batch}, cache_gib {latent.cache_gib:g})")]
    share = f"on a GPU as many as {latent.cache_share:.0%} of the memory then free holds, latent.cache_share"
    return [("rollouts", f"{text}(latent.max_batch; {share})")]


def _length(config: RunConfig, layout: Layout) -> str:
    t = config.train
    if not config.run.arms:
        return "no mid-training: run.arms is empty"
    if t.epochs is not None:
        return f"{t.epochs} epochs; steps follow from the packed corpus"
    steps = t.steps if t.steps is not None else -(-(t.tokens or 0) // layout.tokens_per_step)
    return f"{steps:,} steps, {steps * layout.tokens_per_step:,} tokens"
