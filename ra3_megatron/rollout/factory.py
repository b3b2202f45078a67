"""The configured rollout engine."""

from collections.abc import Sequence

import torch

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.budget import fitting_rows
from ra3_megatron.rollout.engine import RolloutEngine
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.vllm import vllm_engine


def build_rollout_engine(
    config: RunConfig,
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    parallel: Parallel,
    max_tokens: int,
    weights_version: int = 0,
) -> RolloutEngine:
    """The engine that `latent.engine` names, with the weights of `chunks`, for rows of `max_tokens` tokens.

    To be called on every process of a replica. After the weights change, set its `weights_version`. Raises UserError
    for what the engine cannot do.
    """
    latent = config.latent
    if latent.engine == "vllm":
        return vllm_engine(
            chunks, architecture, parallel, latent.max_batch, max_tokens, latent.vllm_memory, weights_version
        )
    rows = fitting_rows(latent, chunks, parallel, max_tokens)
    return MegatronEngine(
        chunks, architecture, parallel, rows, max_tokens, latent.tokens_per_forward, weights_version, latent.cuda_graphs
    )
