"""What Megatron-Core's buffers and optimizer do with weights kept in FP8."""

import torch
import torch.distributed as dist
from transformer_engine.pytorch.tensor import LARGEST


def replace_raw_data(tensor, new_raw_data):
    new_raw_data.detach().copy_(tensor._data)
    tensor._data = new_raw_data


def cast_master_weights_to_fp8(
    model_weights,
    master_weights,
    start_offsets,
    group,
    fsdp_shard_model_weights=None,
    manual_post_all_gather_processing=False,
):
    """Quantise this process's shards with the scale of the whole weight; the rest comes with the all-gather."""
    for weight, master, start in zip(model_weights, master_weights, start_offsets, strict=True):
        amax = torch.zeros(()) if master is None else master.to(weight.dtype).abs().amax().float()
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        scale = LARGEST / amax.clamp_min(1e-12)
        weight._scale_inv.copy_(1 / scale)
        if master is not None:
            part = (master.to(weight.dtype).float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            weight._data.view(-1)[start : start + master.numel()].copy_(part.view(torch.uint8))


def post_all_gather_processing(model_weights):
    """The transposes that the real one makes are not needed here."""
