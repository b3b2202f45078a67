"""The fast paths of training and rollouts: which are on here, with what, and what each missing one costs."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ra3_megatron.algo.logprobs_triton import HAVE_TRITON
from ra3_megatron.model.optional import OptionalPackage, apex, fused_weight_gradients, transformer_engine

State = Literal["on", "off", "no GPU"]


@dataclass(frozen=True)
class FastPath:
    """One of them."""

    name: str
    """What is done."""
    state: State
    """Whether the fast way is taken; `no GPU`: there is none to take it on."""
    found: str
    """With what it is done here."""
    cost: str = ""
    """What its absence costs, and what brings it; empty when it is on."""


@dataclass(frozen=True)
class Machine:
    """What decides about them."""

    gpu: bool
    """Whether torch sees a GPU."""
    te: OptionalPackage
    """Transformer Engine."""
    te_recipes: dict[str, str]
    """FP8 recipe → why the chip cannot run it, empty when it can; no entries without Transformer Engine."""
    apex: OptionalPackage
    """NVIDIA's apex."""
    multi_tensor: bool
    """apex's `amp_C`, whose kernels take many tensors at once."""
    weight_gradients: OptionalPackage
    """apex's extension for weight gradients."""
    attention: tuple[str, ...]
    """Fused attention kernels that torch has here and may use."""
    triton: bool
    """Whether Triton is there, in which the loss has its kernels."""

    @classmethod
    def found(cls) -> "Machine":
        """This one. Raises ImportError or OSError where Transformer Engine is there and does not load."""
        import torch

        te, gpu = transformer_engine(), torch.cuda.is_available()
        return cls(
            gpu=gpu,
            te=te,
            te_recipes=_recipes() if te.usable else {},
            apex=apex(),
            multi_tensor=importlib.util.find_spec("amp_C") is not None,
            weight_gradients=fused_weight_gradients(),
            attention=_attention_kernels(),
            triton=HAVE_TRITON,
        )


def _recipes() -> dict[str, str]:
    """Transformer Engine's own words on every recipe."""
    import transformer_engine.pytorch as te

    checks: dict[str, Callable[..., tuple[bool, str]]] = {
        "delayed, tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
        "nvfp4": te.is_nvfp4_available,
    }
    answers = {name: check(return_reason=True) for name, check in checks.items()}
    return {name: "" if able else reason.rstrip(".") for name, (able, reason) in answers.items()}


def _attention_kernels() -> tuple[str, ...]:
    """Names of torch's fused attention kernels for this device; the processor's flash kernel is always there."""
    import torch

    if not torch.cuda.is_available():
        return ("flash (CPU)",)
    cuda = torch.backends.cuda
    able = {
        "flash": cuda.is_flash_attention_available() and cuda.flash_sdp_enabled(),
        "cuDNN": torch.backends.cudnn.is_available() and cuda.cudnn_sdp_enabled(),
        "memory-efficient": cuda.mem_efficient_sdp_enabled(),
    }
    return tuple(name for name, there in able.items() if there)


def fast_paths(m: Machine) -> list[FastPath]:
    """All of them, in the order of what they are worth."""
    return [
        _layers(m), _fp8(m), _attention(m), _loss(m), _weight_gradients(m), _gradient_norm(m), _adam(m), _graphs(m)
    ]  # fmt: skip


def _state(on: bool, m: Machine) -> State:
    return "on" if on else "off" if m.gpu else "no GPU"


def _layers(m: Machine) -> FastPath:
    name = "layers with fused norms, rotation and SwiGLU"
    if m.te.usable:
        return FastPath(name, "on", f"Transformer Engine {m.te.version}")
    cost = (
        "more kernels, and activations 1.55 times as large (estimate, Qwen2.5-1.5B); "
        "pip install --no-build-isolation 'ra3-megatron[te]'"
    )
    return FastPath(name, _state(False, m), f"torch ({m.te.reason})", cost)


def _fp8(m: Machine) -> FastPath:
    name, able = "FP8 matrix products", [recipe for recipe, reason in m.te_recipes.items() if not reason]
    if able:
        missing = "; ".join(f"{r}: {why}" for r, why in m.te_recipes.items() if why)
        return FastPath(name, "on", f"recipes {', '.join(able)}" + (f" (not {missing})" if missing else ""))
    cost = "BF16 only, half of the chip's products per second; model.precision=fp8 is refused"
    reasons = "; ".join(dict.fromkeys(m.te_recipes.values())) or m.te.reason
    return FastPath(name, _state(False, m), f"none ({reasons})", cost)


def _attention(m: Machine) -> FastPath:
    name = "attention that keeps no scores"
    if m.te.usable:
        return FastPath(name, "on", "Transformer Engine: cuDNN's kernels, packed sequences in one call")
    if m.attention:
        slower = "slower than flash; a newer GPU has that" if m.attention == ("memory-efficient",) else ""
        return FastPath(name, "on", f"torch: {', '.join(m.attention)}", slower)
    cost = "torch's plain attention keeps 1 GB of scores per layer at 32 heads x 4096 x 4096; use a newer GPU or torch"
    return FastPath(name, "off", "torch: plain", cost)


def _loss(m: Machine) -> FastPath:
    name = "loss that reads the logits as they are"
    if m.gpu and m.triton:
        return FastPath(name, "on", "two Triton kernels (they need a C compiler)")
    cost = "a copy of the logits in fp32, 2.3 GiB for 4096 tokens at a vocabulary of 152 k; pip install triton"
    return FastPath(name, _state(False, m), "torch", cost)


def _weight_gradients(m: Machine) -> FastPath:
    name = "weight gradients added in the product"
    if m.te.usable and m.weight_gradients.usable:
        return FastPath(name, "on", "Transformer Engine's layers, and apex for the output layer")
    if m.weight_gradients.usable:
        return FastPath(name, "on", "apex")
    cost = (
        "about 12 bytes of traffic per weight and micro-batch; build NVIDIA's apex from source (--cpp_ext --cuda_ext)"
    )
    if m.te.usable:
        return FastPath(
            name, "on", f"Transformer Engine's layers; the output layer apart ({m.weight_gradients.reason})", cost
        )
    return FastPath(name, _state(False, m), f"apart ({m.weight_gradients.reason})", cost)


def _gradient_norm(m: Machine) -> FastPath:
    name = "gradient norm and clipping over all tensors"
    if m.te.usable:
        return FastPath(name, "on", "Transformer Engine's multi-tensor kernels")
    if m.apex.usable and m.multi_tensor and m.gpu:
        return FastPath(name, "on", "apex's multi-tensor kernels")
    cost = "a kernel and a wait for the device per tensor, hundreds a step; Transformer Engine or NVIDIA's apex"
    return FastPath(name, _state(False, m), "torch, one tensor after another", cost)


def _adam(m: Machine) -> FastPath:
    name = "Adam in one kernel per group"
    if m.te.usable:
        return FastPath(name, "on", "Transformer Engine's FusedAdam")
    if m.apex.usable:
        return FastPath(name, "on", "apex's FusedAdam")
    return FastPath(name, "on", "torch's fused kernel")


def _graphs(m: Machine) -> FastPath:
    name = "CUDA graphs of decoding"
    if m.gpu:
        return FastPath(name, "on", "one process per replica (latent.cuda_graphs)")
    return FastPath(name, "no GPU", "passes are launched one by one", "on a GPU: launches cost more than small passes")
