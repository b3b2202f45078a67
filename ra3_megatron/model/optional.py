"""The one place where Transformer Engine, vLLM and apex are looked for."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from packaging.version import Version

from ra3_megatron.config.errors import UserError

TE_OLDEST, TE_NEXT = Version("2.18"), Version("2.21")
"""Transformer Engine releases that fit megatron-core 0.19: at least the first, below the second."""

VLLM_OLDEST = Version("0.15")
"""First release whose documentation has all that is used: flat log-probabilities, all of them, calls on the model."""


@dataclass(frozen=True)
class OptionalPackage:
    """Whether an optional package can be used here, and if not, why."""

    usable: bool
    """Whether its functions may be called."""
    version: str | None
    """Installed release, if any."""
    reason: str
    """Why it is not usable; empty when it is."""


def _te_release() -> str | None:
    for name in ("transformer-engine", "transformer_engine"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def transformer_engine() -> OptionalPackage:
    """Look for Transformer Engine without importing it (its import needs a CUDA build of torch first)."""
    release = _te_release()
    if importlib.util.find_spec("transformer_engine") is None:
        return OptionalPackage(False, release, "transformer-engine is not installed")
    if release is None:
        return OptionalPackage(False, None, "a package called transformer_engine without release information is there")
    if not TE_OLDEST <= Version(release) < TE_NEXT:
        return OptionalPackage(
            False, release, f"transformer-engine {release} is installed; megatron-core 0.19 needs >=2.18,<2.21"
        )
    import torch

    if not torch.cuda.is_available():
        return OptionalPackage(False, release, "transformer-engine needs a GPU and none was found")
    return OptionalPackage(True, release, "")


def have_te() -> bool:
    """Whether Transformer Engine layers can be built here."""
    return transformer_engine().usable


def require_te(what: str) -> None:
    """Raise UserError naming what asked, what was found and the extra to install, unless TE is usable."""
    found = transformer_engine()
    if not found.usable:
        raise UserError(
            f"{what} needs Transformer Engine; {found.reason}; pip install 'ra3-megatron[te]' on a machine with a "
            "Hopper or newer GPU, or choose precision bf16 and layers local"
        )


def vllm() -> OptionalPackage:
    """Look for vLLM without importing it (its import takes many seconds and wants a GPU)."""
    try:
        release = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return OptionalPackage(False, None, "vllm is not installed")
    if Version(release) < VLLM_OLDEST:
        return OptionalPackage(False, release, f"vllm {release} is installed; {VLLM_OLDEST} is the oldest that fits")
    import torch

    if not torch.cuda.is_available():
        return OptionalPackage(False, release, "vllm needs a GPU here and none was found")
    return OptionalPackage(True, release, "")


def require_vllm(what: str) -> None:
    """Raise UserError naming what asked, what was found and the extra to install, unless vLLM is usable."""
    found = vllm()
    if not found.usable:
        raise UserError(
            f"{what} needs vLLM; {found.reason}; pip install 'ra3-megatron[vllm]' on a machine with a GPU, or set "
            "latent.engine=megatron"
        )


def _apex_place() -> str | None:
    """Where a package called apex lies, if there is one."""
    spec = importlib.util.find_spec("apex")
    return None if spec is None else str(spec.origin or spec.submodule_search_locations)


def apex() -> OptionalPackage:
    """Look for NVIDIA's apex, which is built from source; the registry's package of that name is another."""
    place = _apex_place()
    if place is None:
        return OptionalPackage(False, None, "NVIDIA's apex is not installed")
    if importlib.util.find_spec("apex.multi_tensor_apply") is None:
        return OptionalPackage(False, None, f"the package called apex at {place} is not NVIDIA's")
    try:
        release = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        release = None
    return OptionalPackage(True, release, "")


def check_apex() -> None:
    """Raise UserError for a package called apex that is not NVIDIA's: it breaks Megatron-Core's imports."""
    place = _apex_place()
    if place is not None and not apex().usable:
        raise UserError(
            f"a package called apex is installed at {place} but has no "
            "apex.multi_tensor_apply, so it is not NVIDIA's and breaks megatron-core; pip uninstall apex"
        )


FUSED_WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
"""apex's extension that adds a weight's gradient into the fp32 buffer in the matrix product that makes it."""


def fused_weight_gradients() -> OptionalPackage:
    """Look for apex's extension that Megatron-Core's own linear layers need for `gradient_accumulation_fusion`."""
    found = apex()
    if not found.usable:
        return found
    if importlib.util.find_spec(FUSED_WEIGHT_GRADIENTS) is None:
        return OptionalPackage(
            False, found.version, f"this apex was built without {FUSED_WEIGHT_GRADIENTS} (--cpp_ext --cuda_ext)"
        )
    import torch

    if not torch.cuda.is_available():
        return OptionalPackage(False, found.version, f"{FUSED_WEIGHT_GRADIENTS} needs a GPU and none was found")
    return OptionalPackage(True, found.version, "")
