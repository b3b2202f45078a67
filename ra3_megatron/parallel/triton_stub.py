"""Stand-in for the one Megatron-Core module that cannot be imported without triton (macOS has none).

Every other use of triton in Megatron-Core is guarded. This one, memory paging for experts, is not, although nothing
here calls it. Kept apart and free of imports so that it can run before Megatron-Core is first imported.
"""

import importlib.util
import sys
import types
from typing import Any

MODULE = "megatron.core.transformer.moe.ops.paged_stash"
"""The module that is replaced when triton is missing."""


def _needs_triton(*_args: Any, **_kwargs: Any) -> None:
    raise ImportError("paging of expert activations needs triton; it is not installed")


def install_triton_stub() -> bool:
    """Put the stand-in where triton is missing; returns whether it was needed. Safe to call again."""
    try:
        missing = importlib.util.find_spec("triton") is None
    except ModuleNotFoundError:
        # An import hook that forbids triton answers with this instead of None.
        missing = True
    if not missing:
        return False
    stub = types.ModuleType(MODULE)
    stub.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    stub.paged_stash_copy_kernel = stub.paged_stash_pop_kernel = _needs_triton  # type: ignore[attr-defined]
    sys.modules.setdefault(MODULE, stub)
    return True
