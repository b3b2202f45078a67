"""What a run would be: resolved configuration, arithmetic of batches and processes, parameters, memory per rank."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ra3_megatron.checkpoint.manifest import ARCHITECTURE
from ra3_megatron.checkpoint.state import read_architecture
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import estimate_memory, parameters_per_rank
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout, resolve_layout
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
    """Processes to reckon with: the launcher's, else those of `parallel.data`, else one replica."""
    launched = launch_from_env()
    p = config.parallel
    replica = p.tensor * p.pipeline * p.context
    if launched.source != "alone":
        return launched.world, f"from {launched.source}"
    if p.data is not None:
        return replica * p.data, "tensor x pipeline x context x data"
    return replica, "one replica; give --world-size for more"


def dry_run(config: RunConfig, world_size: int | None = None) -> None:
    """Print everything that can be known without building anything; raises UserError for what would not run."""
    world, why = (world_size, "--world-size") if world_size else default_world(config)
    architecture, where = declared_architecture(config)
    layout = resolve_layout(config, world, architecture)
    console = Console(soft_wrap=True, highlight=False)
    console.print("[bold]# resolved configuration[/bold]")
    console.print(config.to_yaml(), markup=False)
    console.print(_table(config, architecture, where, layout, why))


def _table(config: RunConfig, a: Architecture, where: str, layout: Layout, why: str) -> Table:
    t, gib = config.train, 1 / 2**30
    memory = estimate_memory(config, a, layout)
    table = Table(show_header=False, title="dry run: nothing was started", title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("model", f"{a.family}, {a.parameter_count:,} parameters, from {where}"),
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
        *_rlvr_rows(config, a, layout),
        (
            "compute",
            f"{a.flops_per_token(t.seq_length / 2) * layout.tokens_per_step:.3e} FLOPs per step "
            f"(forward and backward, windows counted as one snippet)",
        ),
        ("parameters per stage", ", ".join(f"{n:,}" for n in parameters_per_rank(a, layout))),
        (
            "memory, fullest rank",
            f"{memory.total * gib:.2f} GiB = weights {memory.weights * gib:.2f} "
            f"+ gradients {memory.gradients * gib:.2f} + optimizer {memory.optimizer * gib:.2f} "
            f"+ activations {memory.activations * gib:.2f} + logits {memory.logits * gib:.2f} (estimate)",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _rlvr_rows(config: RunConfig, a: Architecture, layout: Layout) -> list[tuple[str, str]]:
    """Arithmetic of RLVR's steps, and the memory of its key-value cache."""
    r, t = config.rlvr, config.train
    if not r.steps:
        return []
    element = 4 if config.model.precision == "fp32" else 2
    heads = a.num_kv_heads // layout.tensor
    rows = config.latent.max_batch
    cache = 2 * element * rows * t.seq_length * heads * a.head_dim * (a.num_layers // layout.pipeline)
    answers = r.prompts_per_step * r.group_size
    return [
        (
            "RLVR",
            f"{r.steps:,} steps x {r.prompts_per_step} tasks x {r.group_size} answers = {r.steps * answers:,} answers "
            f"of at most {r.max_tokens} tokens, up to {r.max_refills} refills; {r.prompts_per_step // layout.data} "
            f"tasks per replica and step, {r.minibatches} updates per step, lag up to {r.max_lag}",
        ),
        (
            "RLVR, key-value cache",
            f"{cache / 2**30:.2f} GiB at most = {rows} rows (latent.max_batch) x {t.seq_length} tokens"
            + (", and the weights once more for the reference" if r.kl_coefficient else ""),
        ),
    ]


def _length(config: RunConfig, layout: Layout) -> str:
    t = config.train
    if not config.run.arms:
        return "no mid-training: run.arms is empty"
    if t.epochs is not None:
        return f"{t.epochs} epochs; steps follow from the packed corpus"
    steps = t.steps if t.steps is not None else -(-(t.tokens or 0) // layout.tokens_per_step)
    return f"{steps:,} steps, {steps * layout.tokens_per_step:,} tokens"
