"""Parameters and memory per rank from the configuration alone: what a dry run prints.

A plain account of what Megatron-Core holds, term by term, so that a wrong term can be found by measurement:
weights, gradients, optimizer state (sharded over the replicas), activations kept for the backward pass, logits.
"""

from dataclasses import dataclass

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout


def flops(a: Architecture, tokens: float, context: float, training: bool) -> float:
    """Floating-point operations of `tokens` tokens that attend to `context` tokens on average.

    A forward pass is a third of a training step's forward and backward passes.
    """
    return a.flops_per_token(context) * tokens / (1 if training else 3)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank, by purpose, and its number of parameters."""

    parameters_on_rank: int
    """Weights held by the fullest rank, vocabulary padding included."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def parameters_per_rank(a: Architecture, layout: Layout) -> list[int]:
    """Weights on each pipeline stage's rank, vocabulary padding included."""
    t = layout.tensor
    matrices = (
        a.hidden_size * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads) + 3 * a.hidden_size * a.ffn_hidden_size
    )
    bias = a.head_dim * (a.num_heads + 2 * a.num_kv_heads) if a.qkv_bias else 0
    replicated = 2 * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0)
    layer = (matrices + bias) // t + replicated
    embedding = layout.padded_vocab * a.hidden_size // t
    stages = [layer * (a.num_layers // layout.pipeline) for _ in range(layout.pipeline)]
    stages[0] += embedding
    stages[-1] += a.hidden_size
    if not a.tied_embeddings or layout.pipeline > 1:
        # With tied embeddings and a pipeline the last stage holds a copy of its own.
        stages[-1] += embedding
    return stages


def _activation_bytes_per_token(config: RunConfig, a: Architecture, layout: Layout) -> float:
    """Bytes one layer keeps per token of the micro-batch, on one rank."""
    element = 4 if config.model.precision == "fp32" else 2
    t = layout.tensor
    # Inputs of the two norms and of what follows them: whole on every rank unless sequence parallel.
    streams = 4 * a.hidden_size / (t if config.parallel.sequence else 1)
    q, kv = a.num_heads * a.head_dim / t, a.num_kv_heads * a.head_dim / t
    attention = 2 * (q + kv) + 2 * q + 2 * kv  # projections before and after the rotation, output, values
    mlp = 4 * a.ffn_hidden_size / t  # gate, up, silu(gate), product
    if config.model.recompute == "full":
        return element * a.hidden_size
    if config.model.recompute == "selective":
        attention -= q
    return element * (streams + attention + mlp)


def estimate_memory(config: RunConfig, a: Architecture, layout: Layout) -> MemoryEstimate:
    """Bytes on the fullest rank.

    bf16 and fp8 train with bf16 weights, fp32 gradients and fp32 master weights and moments over data x context ranks;
    fp32 updates the weights in place and keeps the two moments alone.
    """
    stages = parameters_per_rank(a, layout)
    weight_bytes = 4 if config.model.precision == "fp32" else 2
    shards = layout.data * layout.context
    tokens = config.train.micro_batch_size * config.train.seq_length / layout.context
    layers = a.num_layers / layout.pipeline
    worst: MemoryEstimate | None = None
    for stage, parameters in enumerate(stages):
        # 1F1B: stage s holds the activations of (pipeline - s) micro-batches, never more than there are.
        in_flight = min(layout.pipeline - stage, layout.micro_batches)
        activations = layers * tokens * _activation_bytes_per_token(config, a, layout) * in_flight
        # Logits, and their exponentials kept for the backward pass, in fp32 over the vocabulary shard.
        logits = (
            tokens * layout.padded_vocab / layout.tensor * (4 + 4 + weight_bytes) if stage == len(stages) - 1 else 0
        )
        estimate = MemoryEstimate(
            parameters_on_rank=parameters,
            weights=parameters * weight_bytes,
            gradients=parameters * 4,
            optimizer=int(parameters * (8 if config.model.precision == "fp32" else 12) / shards),
            activations=int(activations),
            logits=int(logits),
        )
        if worst is None or estimate.total > worst.total:
            worst = estimate
    assert worst is not None
    return worst
