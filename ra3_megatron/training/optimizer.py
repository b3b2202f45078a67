"""Megatron's distributed AdamW and its learning-rate schedule, from our configuration."""

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ra3_megatron.config.run import RunConfig


def build_optimizer(config: RunConfig, chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """AdamW with fp32 master weights, its state sharded over the replicas.

    The distributed optimizer is used for one replica as well: its checkpoints load into any layout.
    """
    o, p = config.optimizer, config.parallel
    settings = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=config.model.precision != "fp32",
        params_dtype=torch.float32 if config.model.precision == "fp32" else torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=p.overlap_param_gather,
        fp8_recipe=config.model.fp8_recipe if config.model.fp8_params else None,
    )
    optimizer = get_megatron_optimizer(settings, list(chunks), use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        # Megatron finds the groups of a checkpoint again by these values, so that a changed rate could not be loaded.
        # Without them the scheduler's own apply.
        del group["max_lr"], group["min_lr"]
    return optimizer


def apply_settings(config: RunConfig, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> None:
    """Make the configuration's settings hold again after a checkpoint was loaded; only its moments and steps stay."""
    o = config.optimizer
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = (o.beta1, o.beta2), o.eps
    scheduler.step(0)


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """Learning rate as a function of the step alone.

    The engine advances it before each update, so that step 1 of a warm-up of n has lr/n (not 0) and the last step has
    `min_lr`. A checkpoint gives it the number of steps taken, never the shape: that is the configuration's.
    """
    o = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=total_steps,
        lr_decay_style=o.schedule,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=max(1, round(o.decay_fraction * total_steps)) if o.schedule == "WSD" else None,
        lr_wsd_decay_style="linear" if o.schedule == "WSD" else None,
    )
