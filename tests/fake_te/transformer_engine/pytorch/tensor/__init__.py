"""A weight kept in FP8: eight-bit data and one scale, read as the numbers they stand for."""

from types import MethodType

import torch
from torch.utils._pytree import tree_map

LARGEST = 448.0


class QuantizedTensor(torch.Tensor):
    """Base of the weights that are kept in FP8."""


class Float8Tensor(QuantizedTensor):
    """`_data` uint8 and `_scale_inv` []; `dtype` says what it stands for, as in the real package."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype):
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)
        made._data, made._scale_inv = data, scale_inv
        return made

    @classmethod
    def quantize(cls, x: torch.Tensor) -> "Float8Tensor":
        out = cls(torch.empty(x.shape, dtype=torch.uint8), torch.ones(()), x.dtype)
        out.fill_from(x)
        return out

    def fill_from(self, x: torch.Tensor) -> None:
        wide = x.detach().float()
        scale = LARGEST / wide.abs().amax().clamp_min(1e-12)
        self._data.copy_((wide * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8))
        self._scale_inv.copy_(1 / scale)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        return _Dequantize.apply(self)

    def keep_high_precision_init_val(self, value: torch.Tensor) -> None:
        self._high_precision_init_val = value.detach().clone()
        self.get_high_precision_init_val = MethodType(lambda x: getattr(x, "_high_precision_init_val", None), self)
        self.clear_high_precision_init_val = MethodType(lambda x: x.__dict__.pop("_high_precision_init_val"), self)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            source = args[1].plain() if isinstance(args[1], cls) else args[1]
            args[0].fill_from(source)
            return args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            made = cls(args[0]._data, args[0]._scale_inv, args[0].dtype)
            made.__dict__.update({k: v for k, v in args[0].__dict__.items() if k in ("_data", "_scale_inv")})
            return made
        plain = tree_map(lambda x: x.plain() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def plain(self) -> torch.Tensor:
        return (self._data.view(torch.float8_e4m3fn).float() * self._scale_inv).to(self.dtype)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.plain()

    @staticmethod
    def backward(ctx, grad):
        return grad
