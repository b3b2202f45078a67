"""Parameters, operations and memory per rank from the configuration alone: what a dry run prints.

A plain account of what Megatron-Core holds, term by term, so that a wrong term can be found by measurement: weights,
gradients, optimizer state (sharded over the replicas), what is kept for the backward pass, logits, caches of rollouts.
A test measures what autograd really saves; `benchmarks/gpu_memory.py` measures peaks on a GPU.
"""

from dataclasses import dataclass, replace

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.ra3 import THINKING_ARMS
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout

GIB = 2**30

POSITIONS = 16
"""Positions of a cached row are a multiple of this: rows of masks then begin where a GPU's kernels want them to."""

OUTSIDE_OF_TORCH = 1 << 30
"""Bytes left free on a device for what torch's allocator does not count (CUDA context, cuBLAS, NCCL) when the largest
micro-batch is sought: a round figure."""


def flops(a: Architecture, tokens: float, context: float, training: bool) -> float:
    """Floating-point operations of `tokens` tokens that attend to `context` tokens on average.

    A forward pass is a third of a training step's forward and backward passes.
    """
    return a.flops_per_token(context) * tokens / (1 if training else 3)


@dataclass(frozen=True)
class Kernels:
    """Which code runs the layers: it decides what they keep for the backward pass."""

    te: bool
    """Transformer Engine's layers rather than torch's."""
    gpu: bool
    """A norm keeps its input alone, and the loss reads the logits as they are; torch's norms on a CPU keep, in fp32,
    the input and what it is scaled to, and the loss a copy of the logits in fp32."""

    @classmethod
    def expected(cls, config: RunConfig) -> "Kernels":
        """Of a GPU with Transformer Engine for bf16 and fp8 unless `model.layers` is `local`, of a CPU for fp32."""
        m = config.model
        gpu = m.precision != "fp32"
        return cls(te=m.layers == "te" or (gpu and m.layers != "local"), gpu=gpu or m.layers == "te")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank, by purpose, and its number of parameters."""

    parameters_on_rank: int
    """Weights held by the fullest rank, vocabulary padding included."""
    weights: int
    """With their copies in FP8."""
    gradients: int
    optimizer: int
    activations: int
    """Kept from the forward to the backward pass, all micro-batches that are under way."""
    logits: int
    """Most that the final norm, the output layer and the loss hold at once: between the two passes."""
    recomputed: int = 0
    """Activations of one layer, or of its recomputed part, made anew in the backward pass, when the logits are gone."""
    frozen: int = 0
    """Weights of a second model: the scorer of an E-step, the reference of RLVR."""
    cache: int = 0
    """Keys and values of rollouts, at most."""

    @property
    def total(self) -> int:
        """The most that is held at once, bytes."""
        held = self.weights + self.gradients + self.optimizer + self.activations + self.frozen + self.cache
        return held + max(self.logits, self.recomputed)


def _stages(a: Architecture, layout: Layout) -> list[tuple[int, int]]:
    """Weights on each pipeline stage's rank, vocabulary padding included: outside of experts, and of its experts."""
    t, layers = layout.tensor, a.num_layers // layout.pipeline
    bias = a.head_dim * (a.num_heads + 2 * a.num_kv_heads) if a.qkv_bias else 0
    replicated = 2 * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0) + a.num_experts * a.hidden_size
    shared, experts = _matrices(a, layout)
    outside = [layers * (shared + bias // t + replicated) for _ in range(layout.pipeline)]
    embedding = layout.padded_vocab * a.hidden_size // t
    outside[0] += embedding
    outside[-1] += a.hidden_size
    if not a.tied_embeddings or layout.pipeline > 1:
        # With tied embeddings and a pipeline the last stage holds a copy of its own.
        outside[-1] += embedding
    return [(count, layers * experts) for count in outside]


def parameters_per_rank(a: Architecture, layout: Layout) -> list[int]:
    """Weights on each pipeline stage's rank, vocabulary padding included."""
    return [outside + experts for outside, experts in _stages(a, layout)]


def _matrices(a: Architecture, layout: Layout) -> tuple[int, int]:
    """Weights of one layer's matrices on one rank: those that are split alike, and those of its experts."""
    attention = a.hidden_size * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    if a.num_experts:
        return attention // layout.tensor, a.mlp_parameters // (layout.expert * layout.expert_tensor)
    return (attention + a.mlp_parameters) // layout.tensor, 0


def _element(config: RunConfig) -> int:
    """Bytes of a number that travels between layers."""
    return 4 if config.model.precision == "fp32" else 2


def _norm_bytes(width: float, element: int, kernels: Kernels) -> float:
    """Bytes a norm over `width` numbers keeps per token."""
    return width * element + 4 if kernels.gpu else 8 * width + 4


def _stream_width(config: RunConfig, a: Architecture, layout: Layout) -> float:
    """Numbers of the residual stream per token: whole on every rank unless sequence parallel."""
    return a.hidden_size / (layout.tensor if config.parallel.sequence else 1)


def _attention_bytes(config: RunConfig, a: Architecture, layout: Layout, kernels: Kernels, fp8: bool) -> float:
    """Bytes the attention of one layer keeps per token, between its two linear layers' inputs."""
    e, t = _element(config), layout.tensor
    q, kv = a.num_heads * a.head_dim / t, a.num_kv_heads * a.head_dim / t
    projected = q + 2 * kv
    """Values are a view of the projection's output, which keeps all of it alive."""
    statistics = 4 * a.num_heads / t
    copied = q * _eight_bits(config) if fp8 else 0.0
    if _again(config, "core_attn"):
        kept = (q + kv + projected + q) * e + copied
    elif kernels.te:
        # It copies the values; its output is what the next linear layer keeps, unless that keeps an FP8 copy.
        kept = (2 * q + 2 * kv) * e + statistics + copied
    elif layout.context == 1:
        # On a GPU all sequences of a window are one call; else their outputs are kept, and then laid side by side.
        calls = 1 if kernels.gpu and e == 2 else 2
        kept = (q + kv + projected + calls * q) * e + statistics
    else:
        kept = (q + 2 * kv * layout.context + 2 * q) * e + statistics
    if not kernels.te:
        kept += 4 * a.head_dim * e  # cosines and sines, for queries and for keys
    if a.qk_norm:
        kept += _qk_norm_bytes(q, kv, a, e, kernels)
    return kept


def _qk_norm_bytes(q: float, kv: float, a: Architecture, element: int, kernels: Kernels) -> float:
    heads = (q + kv) / a.head_dim
    if kernels.te:
        return (q + kv) * element + 4 * heads
    if kernels.gpu:
        return q * element + 4 * heads  # the keys are a view of the projection's output
    return 8 * q + (8 if element == 2 else 4) * kv + 4 * heads


@dataclass(frozen=True)
class _LayerBytes:
    """What one layer has per token of the micro-batch, on one rank."""

    kept: float
    """Bytes kept for the backward pass when the layer as a whole is not computed anew."""
    anew: float
    """Bytes of its MLP that are made anew in the backward pass."""


def _again(config: RunConfig, part: str) -> bool:
    """Whether this part of every layer is computed anew in the backward pass."""
    return config.model.recompute == "selective" and part in config.model.recompute_modules


def _eight_bits(config: RunConfig) -> float:
    """Bytes of a number in the recipe's own format."""
    return 0.5 if config.model.fp8_recipe == "nvfp4" else 1.0


def _fp8_share(config: RunConfig, a: Architecture) -> float:
    """Share of the layers that compute in FP8."""
    m = config.model
    if m.precision != "fp8":
        return 0.0
    return max(0, a.num_layers - m.bf16_layers_at_start - m.bf16_layers_at_end) / a.num_layers


def _layer_bytes(config: RunConfig, a: Architecture, layout: Layout, kernels: Kernels, fp8: bool) -> _LayerBytes:
    """Of a layer that computes in FP8, or of one that does not."""
    e, stream = _element(config), _stream_width(config, a, layout)
    # Transformer Engine keeps the inputs of its matrix products in the numbers it multiplies.
    multiplied = _eight_bits(config) if fp8 else e
    norm = _norm_bytes(stream, e, kernels)
    whole = norm + stream * multiplied
    attention = whole + _attention_bytes(config, a, layout, kernels, fp8)
    if a.num_experts:
        mlp = whole + _expert_bytes(a, layout, kernels, e, multiplied)
    else:
        mlp = whole + _mlp_bytes(a.ffn_hidden_size / layout.tensor, kernels, e, multiplied)
    if not _again(config, "moe" if a.num_experts else "mlp"):
        return _LayerBytes(attention + mlp, 0.0)
    # Where it begins again: the norm belongs to a dense MLP, and stands before a mixture.
    start = norm + stream * e if a.num_experts else stream * e
    return _LayerBytes(attention + start, mlp - start)


def _kept_and_again(config: RunConfig, a: Architecture, layout: Layout, kernels: Kernels) -> tuple[float, float]:
    """Bytes per token that a stage's layers keep of one micro-batch, and those made anew at once."""
    m, share = config.model, _fp8_share(config, a)
    layers, stream = a.num_layers / layout.pipeline, _stream_width(config, a, layout) * _element(config)
    low, high = (_layer_bytes(config, a, layout, kernels, fp8) for fp8 in (True, False))
    layer = share * low.kept + (1 - share) * high.kept
    if m.recompute == "full":
        again = layers if m.recompute_layers is None else min(m.recompute_layers, layers)
        # The input of a layer that is computed anew is what was kept of it. Those that are not are gone by then.
        return again * stream + (layers - again) * layer, layer - stream if again == layers else 0.0
    return max(0, layers - m.offload_layers) * layer, max(low.anew, high.anew)


def _mlp_bytes(ffn: float, kernels: Kernels, element: int, multiplied: float) -> float:
    """Bytes a gated MLP of width `ffn` keeps per token: gate, up and product; torch's also silu(gate), a copy of up."""
    return 2 * ffn * element + ffn * multiplied + (0 if kernels.te else 2 * ffn * element)


def _expert_bytes(a: Architecture, layout: Layout, kernels: Kernels, element: int, multiplied: float) -> float:
    """Bytes a mixture keeps per token of the micro-batch on one rank, tokens dealt out evenly over the experts.

    A rank routes its own share of the tokens; its experts get as many copies of tokens as if it kept them all.
    """
    k, ffn = a.experts_per_token, a.expert_ffn_hidden_size / layout.expert_tensor
    # Probabilities and indices of the chosen, and where they stand among all: in fp32, int64 and bool.
    router = (4 * a.num_experts + a.num_experts + 32 * k) / layout.tensor
    copy = a.hidden_size * multiplied + _mlp_bytes(ffn, kernels, element, multiplied)
    if not kernels.te:
        copy += ffn * element  # the product before it is weighted
    return router + k * layout.expert_tensor / layout.tensor * copy


def _logits_bytes(config: RunConfig, a: Architecture, layout: Layout, tokens: float, kernels: Kernels) -> float:
    """Bytes held around the loss: the logits, over which their gradient is written, and on a CPU their copy in fp32;
    or, a moment later, that gradient and the one of the output layer's weight."""
    columns, e = layout.padded_vocab / layout.tensor, _element(config)
    both = tokens * columns * (e if kernels.gpu or e == 4 else 4 + e)
    return max(both, tokens * columns * e + columns * a.hidden_size * e)


def _in_flight(config: RunConfig, layout: Layout, stage: int) -> float:
    """Micro-batches, counted in whole passes through the stage's layers, that wait for their backward pass."""
    chunks, after = config.parallel.virtual_pipeline or 1, layout.pipeline - stage - 1
    if chunks == 1:
        return min(after + 1, layout.micro_batches)
    warmup = 2 * after + (chunks - 1) * layout.pipeline + 1
    return min(warmup, layout.micro_batches * chunks) / chunks


def _optimizer_bytes(config: RunConfig) -> int:
    """Bytes per parameter: two moments in fp32, and master weights where the model's are not fp32."""
    return 8 if config.model.precision == "fp32" else 12


def _weights_bytes(config: RunConfig, a: Architecture, layout: Layout, parameters: int) -> int:
    """Weights as they are trained. FP8 layers have two more copies of their matrices, one of them transposed; with
    `model.fp8_params` these two are all there is."""
    matrices = sum(_matrices(a, layout)) * (a.num_layers // layout.pipeline) * _fp8_share(config, a)
    copies = 2 * _eight_bits(config) - (_element(config) if config.model.fp8_params else 0)
    return parameters * _element(config) + int(copies * matrices)


def cache_length(max_tokens: int) -> int:
    """Positions of a cached row: its own, and one that padding is written to."""
    return -(-(max_tokens + 1) // POSITIONS) * POSITIONS


def row_bytes(layers: int, kv_heads: int, width: int, element: int, max_tokens: int) -> int:
    """Keys and values of one row of rollouts on a process with so many layers and key heads."""
    return 2 * layers * kv_heads * width * element * cache_length(max_tokens)


def cached_rows(config: RunConfig, a: Architecture, layout: Layout) -> tuple[int, int]:
    """Most rows of rollouts of a window each, and bytes of one on a rank; no rows where nothing is sampled here.

    Raises UserError when `latent.cache_gib` does not hold one.
    """
    latent, tokens = config.latent, config.train.seq_length
    draws = config.rlvr.steps or any(arm in THINKING_ARMS for arm in config.run.arms)
    layers, heads = a.num_layers // layout.pipeline, a.num_kv_heads // layout.tensor
    row = row_bytes(layers, heads, a.head_dim, _element(config), tokens)
    if not draws or latent.engine != "megatron":
        return 0, row
    if latent.cache_gib is None:
        return latent.max_batch, row
    rows = int(latent.cache_gib * GIB) // row
    if rows < 1:
        raise UserError(
            f"latent.cache_gib = {latent.cache_gib:g}; keys and values of one row of {tokens} tokens take "
            f"{row / GIB:.3f} GiB; raise it, or shorten the rows (train.seq_length)"
        )
    return min(rows, latent.max_batch), row


def cache_bytes(config: RunConfig, a: Architecture, layout: Layout) -> int:
    """Keys and values of rollouts on one rank, at most; 0 where nothing is sampled here."""
    rows, row = cached_rows(config, a, layout)
    return rows * row


def _has_second_model(config: RunConfig) -> bool:
    scores = any(arm in ("ra3", "brite") for arm in config.run.arms) and config.variational.scorer == "frozen"
    return scores or bool(config.rlvr.steps and config.rlvr.kl_coefficient)


def estimate_memory(
    config: RunConfig, a: Architecture, layout: Layout, kernels: Kernels | None = None
) -> MemoryEstimate:
    """Bytes on the fullest rank, in the stage of the run that needs most. `kernels`: `Kernels.expected` unless given.

    bf16 and fp8 train with bf16 weights, fp32 gradients and fp32 master weights and moments over data x context ranks
    (of experts over the ranks that hold the same ones); fp32 updates the weights in place and keeps the two moments
    alone. Where some replicas only generate, the fullest rank trains: it shares the optimizer with fewer, and has no
    cache.
    """
    kernels = kernels or Kernels.expected(config)
    training = layout.data - layout.generating
    expert_data = layout.expert_data * training / layout.data
    tokens = config.train.micro_batch_size * config.train.seq_length / layout.context
    stream, element = _stream_width(config, a, layout), _element(config)
    layers, again = _kept_and_again(config, a, layout, kernels)
    found = []
    for stage, (outside, experts) in enumerate(_stages(a, layout)):
        parameters = outside + experts
        kept = layers * _in_flight(config, layout, stage)
        last = stage == layout.pipeline - 1
        final_norm = tokens * (_norm_bytes(stream, element, kernels) + stream * element)
        weights = _weights_bytes(config, a, layout, parameters)
        found.append(
            MemoryEstimate(
                parameters_on_rank=parameters,
                weights=weights,
                gradients=parameters * 4,
                optimizer=int(
                    (outside / (training * layout.context) + experts / expert_data) * _optimizer_bytes(config)
                ),
                activations=int(tokens * kept),
                logits=int(final_norm + _logits_bytes(config, a, layout, tokens, kernels)) if last else 0,
                recomputed=int(tokens * again),
                frozen=weights if _has_second_model(config) else 0,
                cache=0 if layout.generating else cache_bytes(config, a, layout),
            )
        )
    return max(found, key=lambda e: e.total)


def largest_micro_batch(config: RunConfig, a: Architecture, layout: Layout, memory: int) -> int:
    """Windows of a micro-batch that fit into `memory` bytes of a device, `OUTSIDE_OF_TORCH` left free; 0 = none."""

    def fits(windows: int) -> bool:
        changed = replace(config, train=replace(config.train, micro_batch_size=windows))
        return estimate_memory(changed, a, layout).total <= memory - OUTSIDE_OF_TORCH

    # Memory rises with the windows: double until they do not fit, then halve the gap.
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
