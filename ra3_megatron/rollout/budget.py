"""How many rows the keys and values of a rollout engine leave room for."""

from collections.abc import Sequence
from typing import Any

import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import GIB, row_bytes
from ra3_megatron.config.ra3 import LatentConfig
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.collectives import all_reduce_max
from ra3_megatron.parallel.groups import Parallel


def fitting_rows(latent: LatentConfig, chunks: Sequence[torch.nn.Module], parallel: Parallel, max_tokens: int) -> int:
    """All processes of a replica: rows of `max_tokens` tokens that fit into the memory `latent` allows, at most
    `latent.max_batch`; the same number on each. Raises UserError when not even one does."""
    config: Any = unwrap(chunks[0]).config
    layers = sum(len(unwrap(c).decoder.layers) for c in chunks)
    heads = config.num_query_groups // config.tensor_model_parallel_size
    row = row_bytes(layers, heads, config.kv_channels, config.params_dtype.itemsize, max_tokens)
    budget, what = _budget(latent, parallel)
    own = latent.max_batch if budget is None or not row else min(latent.max_batch, budget // row)
    rows = -all_reduce_max(parallel.group("mp"), -own, "rows of the rollout engine")
    if rows < 1:
        there = "less on another process" if budget is None or own else f"{budget / GIB:.2f} GiB"
        raise UserError(
            f"rollouts of {max_tokens} tokens need {row / GIB:.2f} GiB of keys and values a row; found {there} "
            f"({what}); raise it, or make the rows shorter"
        )
    return rows


def _budget(latent: LatentConfig, parallel: Parallel) -> tuple[int | None, str]:
    """Bytes for keys and values on this process, none = as many as asked, and where the number comes from."""
    if latent.cache_gib is not None:
        return int(latent.cache_gib * GIB), f"latent.cache_gib = {latent.cache_gib:g}"
    if not parallel.on_gpu:
        return None, "no limit on a CPU"
    device = parallel.device
    # What torch holds and does not use is free for it as well.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return int(latent.cache_share * free), f"latent.cache_share = {latent.cache_share:g} of {free / GIB:.2f} GiB"
