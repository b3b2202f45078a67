"""Fused Adam with Transformer Engine's surface on torch's kernel, for machines without Transformer Engine.

Megatron-Core's distributed optimizer saves with torch's own Adam but cannot load again: torch keeps `step` per
parameter, Transformer Engine's FusedAdam per group, and only the latter is written to the checkpoint.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW in one fused kernel per parameter group, `step` kept in the group.

    State per parameter: `exp_avg` and `exp_avg_sq` in fp32. The update of a parameter depends on nothing but its own
    values, so a resumed run continues bit for bit. Raises ValueError for options that only Transformer Engine has.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **unsupported: Any,
    ) -> None:
        if capturable or unsupported:
            asked = sorted(unsupported) + (["capturable"] if capturable else [])
            raise ValueError(
                f"Adam options {asked} exist only in Transformer Engine; it is not installed; "
                "leave them out or install the extra 'te'"
            )
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; a group without any keeps its `step`."""
        loss = closure() if closure is not None else None
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            for p in params:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            beta1, beta2 = group["betas"]
            steps = torch.full((), float(group["step"]), dtype=torch.float32, device=params[0].device)
            kernel(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [steps] * len(params),
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
        return loss


def install_fused_adam() -> bool:
    """Hand `FusedAdam` to Megatron-Core's optimizers where neither Transformer Engine nor apex provides one.

    Returns whether it was needed. Works on a CPU and on a GPU; safe to call again.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if optimizers.Adam is FusedAdam:
        return True
    if not optimizers.USING_PYTORCH_OPTIMIZER:
        return False
    optimizers.Adam = FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
    return True
