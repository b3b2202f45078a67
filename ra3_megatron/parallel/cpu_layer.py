"""The one place that lets Megatron-Core run without CUDA.

Megatron-Core 0.19 calls `torch.cuda.*` and allocates with `device="cuda"` without asking whether a GPU is there.
`install` redirects those names to their CPU meaning, and only when no CUDA device exists: with a GPU it changes
nothing. `torch.cuda.is_available()` stays False and `device_count()` 0, so code that asks behaves as on a CPU.

`REDIRECTIONS` is the whole list of what is replaced and why; a test walks it.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

from ra3_megatron.config.errors import UserError

CHECKED_VERSIONS = ("0.19.2",)
"""Releases of megatron-core whose call sites were walked; names move between minor releases."""

_FACTORIES: tuple[str, ...] = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"),
    *("tensor", "zeros", "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like"),
)

_CPU = torch.device("cpu")
_installed = False


@dataclass(frozen=True)
class Redirection:
    """One replaced name: where it lives, what stands there now and which call needs it."""

    target: str
    """Dotted name that is replaced."""
    why: str
    """The Megatron-Core or torch call that fails without it."""
    make: Callable[[Any], Any]
    """Builds the replacement from the original object."""


class _CpuStream:
    """A CUDA stream on a machine whose work is always done: every wait returns at once."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def wait_stream(self, _stream: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _CpuEvent()

    def query(self) -> bool:
        return True


class _CpuEvent:
    """A CUDA event that has already happened; `elapsed_time` is not offered because nothing was timed."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, _stream: Any = None) -> None: ...
    def wait(self, _stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_STREAM = _CpuStream()


def _nothing(_original: Any) -> Callable[..., None]:
    return lambda *_args, **_kwargs: None


def _returns(value: Any) -> Callable[[Any], Callable[..., Any]]:
    return lambda _original: lambda *_args, **_kwargs: value


def _cpu_get_rng_state(_original: Any) -> Callable[..., torch.Tensor]:
    return lambda *_args, **_kwargs: torch.get_rng_state()


def _cpu_set_rng_state(_original: Any) -> Callable[..., None]:
    return lambda new_state, *_args, **_kwargs: torch.set_rng_state(new_state)


def _cpu_manual_seed(_original: Any) -> Callable[..., None]:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return manual_seed


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _cpu_factory(original: Any) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
            # Pinned memory needs a CUDA driver; on a CPU every page is as good as another.
            kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def _tensor_to_cpu(_original: Any) -> Callable[..., torch.Tensor]:
    return lambda tensor, *_args, **_kwargs: tensor


def _tensor_to(original: Any) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        # Megatron compares this string with 'torch.cuda.FloatTensor'; everybody else gets the truth.
        if isinstance(answer, str) and answer.startswith("torch.") and not answer.startswith("torch.cuda."):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron."):
                return "torch.cuda." + answer.removeprefix("torch.")
        return answer

    return type_


def _split_sizes(_original: Any) -> Callable[..., Any]:
    """Sizes of an exchange as plain numbers where numpy is asked for; Megatron converts them on their way off a GPU."""

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


def _filled(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zeros behind it, `rows` in all."""
    return torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])))


def _uneven_gather(original: Any) -> Callable[..., torch.Tensor]:
    """gloo gathers equal shares alone: fill them up to the longest, and cut."""

    @functools.wraps(original)
    def gather(input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any) -> torch.Tensor:
        sizes = [] if output_split_sizes is None or group.size() == 1 else [int(n) for n in output_split_sizes]
        if len(set(sizes)) < 2:
            return original(input_, group, output_split_sizes, *args)
        shares = original(_filled(input_, max(sizes)), group, None, *args).split(max(sizes))
        return torch.cat([share[:n] for share, n in zip(shares, sizes, strict=True)])

    return gather


def _uneven_reduce_scatter(original: Any) -> Callable[..., torch.Tensor]:
    """As `_uneven_gather`, for the sum that goes with it."""

    @functools.wraps(original)
    def reduce_scatter(input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any) -> torch.Tensor:
        sizes = [] if input_split_sizes is None or group.size() == 1 else [int(n) for n in input_split_sizes]
        if len(set(sizes)) < 2:
            return original(input_, group, input_split_sizes, *args)
        whole = torch.cat([_filled(share, max(sizes)) for share in input_.split(sizes)])
        return original(whole, group, None, *args)[: sizes[group.rank()]]

    return reduce_scatter


def _stream_context(_original: Any) -> Callable[..., contextlib.AbstractContextManager[None]]:
    return lambda *_args, **_kwargs: contextlib.nullcontext()


REDIRECTIONS: tuple[Redirection, ...] = (
    Redirection(
        "torch.cuda.current_device",
        "device= of RotaryEmbedding, GlobalMemoryBuffer, DistributedDataParallel buffers, p2p receive buffers, "
        "gather and reduce-scatter outputs of tensor_parallel.mappings, KV caches",
        _returns(_CPU),
    ),
    Redirection("torch.cuda.set_device", "set-up code that names a local rank", _nothing),
    Redirection("torch.cuda.synchronize", "timers, p2p_communication, dist_checkpointing filesystem_async", _nothing),
    Redirection("torch.cuda.empty_cache", "DistributedDataParallel.offload_grad_buffers, resharding", _nothing),
    Redirection("torch.cuda.current_stream", "param_and_grad_buffer.start_grad_sync", _returns(_STREAM)),
    Redirection("torch.cuda.default_stream", "cpu offload hooks", _returns(_STREAM)),
    Redirection("torch.cuda.Stream", "DDP communication stream, resharding copy services", lambda _: _CpuStream),
    Redirection("torch.cuda.Event", "resharding.execution, inference bookkeeping", lambda _: _CpuEvent),
    Redirection("torch.cuda.stream", "`with torch.cuda.stream(...)` in DDP and resharding", _stream_context),
    Redirection("torch.cuda.get_rng_state", "CudaRNGStatesTracker.add, rerun_state_machine", _cpu_get_rng_state),
    Redirection("torch.cuda.set_rng_state", "rerun_state_machine", _cpu_set_rng_state),
    Redirection("torch.cuda.manual_seed", "model_parallel_cuda_manual_seed", _cpu_manual_seed),
    Redirection("torch.Tensor.cuda", "tensor_parallel.data.broadcast_data, rope_utils, grad_scaler", _tensor_to_cpu),
    Redirection("torch.Tensor.pin_memory", "KV-cache bookkeeping, optimizer offload", _tensor_to_cpu),
    Redirection("torch.Tensor.to", "`.to('cuda')` in schedules and inference contexts", _tensor_to),
    Redirection("torch.Tensor.type", "type strings in optimizer, distrib_optimizer, clip_grads", _tensor_type),
    *(
        Redirection(f"torch.{name}", "device='cuda' or pin_memory=True in megatron.core", _cpu_factory)
        for name in _FACTORIES
    ),
    Redirection(
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        "RNG tracker and activation recompute read the CUDA generator",
        _cpu_get_rng_state,
    ),
    Redirection(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "RNG tracker and activation recompute set the CUDA generator",
        _cpu_set_rng_state,
    ),
    Redirection(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        "all_to_all_single of the experts' tokens wants numbers, not tensors, as sizes",
        _split_sizes,
    ),
    Redirection(
        "megatron.core.tensor_parallel.mappings._gather_along_first_dim",
        "experts under tensor parallelism gather as many tokens as each process has",
        _uneven_gather,
    ),
    Redirection(
        "megatron.core.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        "and add up as many as it had",
        _uneven_reduce_scatter,
    ),
)


def resolve(target: str) -> tuple[Any, str]:
    """Return the object that holds the last part of the dotted name `target`, and that part."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            holder: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise AttributeError(f"{target} names nothing that can be imported")


def check_version() -> str:
    """Return the installed release of megatron-core; raise `UserError` when it is not a checked one."""
    found = importlib.metadata.version("megatron-core")
    if found not in CHECKED_VERSIONS:
        raise UserError(
            f"running without a GPU needs megatron-core {' or '.join(CHECKED_VERSIONS)}; found {found}; "
            f"pip install megatron-core=={CHECKED_VERSIONS[-1]} (Python >= 3.12)"
        )
    return found


def is_installed() -> bool:
    """Whether `install` redirected names in this process."""
    return _installed


def originals() -> Iterator[tuple[Redirection, Any]]:
    """Yield every redirection with the object that stood at its name before `install`."""
    for entry in REDIRECTIONS:
        yield entry, _originals[entry.target]


_originals: dict[str, Any] = {}


def install() -> bool:
    """Make Megatron-Core run on a CPU; return False and change nothing when CUDA is there.

    Safe to call again. Raises `UserError` for a release of megatron-core that was not checked.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    check_version()
    # `with torch.device("meta")` looks factories up in this cached table; filled now, it holds the originals,
    # which is what still reaches it through the wrappers.
    _device_constructors()
    for entry in REDIRECTIONS:
        holder, name = resolve(entry.target)
        original = getattr(holder, name)
        _originals[entry.target] = original
        setattr(holder, name, entry.make(original))
    _installed = True
    return True
