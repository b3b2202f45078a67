"""Linear layers and norms with the parameter names, FP8 metadata and weight caches of the real ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformer_engine.pytorch.fp8 import DelayedState, FP8GlobalStateManager, rounded
from transformer_engine.pytorch.tensor import Float8Tensor, QuantizedTensor

NO_STATE = torch.empty(0, dtype=torch.uint8)


class Module(torch.nn.Module):
    """FP8 metadata, set up in the first pass that runs in FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = False
        self.fp8_initialized = False
        self._fp8_workspaces: dict[str, torch.Tensor] = {}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        self.fp8_initialized = self.fp8
        if self.fp8:
            self.fp8_meta["num_gemms"] = num_gemms
            self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()
            self.init_fp8_meta_tensors(self.fp8_meta["recipe"])
            if self.fp8_meta["recipe"].delayed() and self not in FP8GlobalStateManager.delayed:
                FP8GlobalStateManager.delayed.append(self)

    def init_fp8_meta_tensors(self, recipe) -> None:
        if recipe.delayed() and "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["scaling_fwd"] = DelayedState(recipe, 3 * self.fp8_meta["num_gemms"])
            self.fp8_meta["scaling_bwd"] = DelayedState(recipe, 2 * self.fp8_meta["num_gemms"])

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([1, 2, 3], dtype=torch.uint8) if "scaling_fwd" in self.fp8_meta else NO_STATE

    def set_extra_state(self, state) -> None:
        if state is not None and state.numel():
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")


class Linear(Module):
    """A linear layer; `weight` [out, in], rounded through FP8 where the real one multiplies in it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cpu",
    ) -> None:
        super().__init__()
        assert tp_size == 1, "the stand-in has no tensor parallelism"
        self.parallel_mode, self.tp_size = parallel_mode, tp_size
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.save_original_input = False
        self.return_bias = return_bias
        weight = torch.empty(out_features, in_features, dtype=params_dtype)
        init_method(weight)
        self.weight = torch.nn.Parameter(weight)
        if FP8GlobalStateManager.with_fp8_parameters():
            self.weight = torch.nn.Parameter(Float8Tensor.quantize(weight))
            recipe = FP8GlobalStateManager.get_fp8_recipe()
            if recipe.delayed():
                self.fp8_meta["num_gemms"] = 1
                self.init_fp8_meta_tensors(recipe)
            if FP8GlobalStateManager.high_precision:
                self.weight.keep_high_precision_init_val(weight)
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        self.init_fp8_metadata()
        weight = self.weight.dequantize() if isinstance(self.weight, QuantizedTensor) else self.weight
        if self.fp8:
            inp = inp + (self._rounded(inp, 0) - inp).detach()
            if is_first_microbatch is None or is_first_microbatch or "weight" not in self._fp8_workspaces:
                self._fp8_workspaces["weight"] = self._rounded(weight, 1)
            weight = weight + (self._fp8_workspaces["weight"] - weight).detach()
        return F.linear(inp, weight, self.bias)

    def _rounded(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        if not self.fp8_meta["recipe"].delayed():
            return rounded(x)
        state = self.fp8_meta["scaling_fwd"]
        state.amax_history[0, slot] = torch.maximum(state.amax_history[0, slot], x.detach().abs().amax().float())
        return rounded(x, state.scale[slot])


class LayerNormLinear(Linear):
    """RMSNorm and a linear layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **given: Any,
    ) -> None:
        super().__init__(in_features, out_features, **given)
        assert normalization == "RMSNorm"
        assert not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=given["params_dtype"]))

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        normed = F.rms_norm(inp, (inp.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(normed, is_first_microbatch)


class RMSNorm(torch.nn.Module):
    """RMSNorm; like the real one it has an extra state, which is empty."""

    def __init__(self, normalized_shape, eps=1e-5, sequence_parallel=False, zero_centered_gamma=False, **given):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=given["params_dtype"]))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)

    def get_extra_state(self):
        return NO_STATE

    def set_extra_state(self, state):
        assert state is None or not state.numel()


class LayerNorm(RMSNorm):
    """Only its name is needed."""


class GroupedLinear(Module):
    """Linear layers side by side, `weight<i>` [out, in] each, for as many rows of the input as `m_splits` says."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cpu",
        ub_name: str | None = None,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
    ) -> None:
        super().__init__()
        assert tp_size == 1, "the stand-in has no tensor parallelism"
        assert not bias
        assert not single_grouped_weight
        self.num_gemms, self.use_bias, self.tp_size = num_gemms, bias, tp_size
        self.in_features, self.out_features, self.fp8_calibration = in_features, out_features, False
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype)
            init_method(weight)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        self.init_fp8_metadata(self.num_gemms)
        assert not self.fp8, "the stand-in groups in BF16 and fp32 alone"
        parts = inp.split(m_splits)
        return torch.cat([F.linear(x, getattr(self, f"weight{i}")) for i, x in enumerate(parts)])
