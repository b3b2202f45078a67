"""Collectives with a deadline that name the rank that is missing and what it was last doing.

Every function takes the group it acts on; none falls back to all processes. Counters and objects travel over gloo,
also on GPU machines: they are small, and gloo can be waited for with a deadline.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ra3_megatron.config.errors import UserError
from ra3_megatron.parallel.whereabouts import CollectiveTimeout, Group, PeerFailed, peer_failed

EXIT_STUCK = 75
"""Exit code of a process that sat in one phase past its deadline and could not be interrupted."""

_SLICE_S = 1.0
"""How often a wait looks whether a peer has failed meanwhile, seconds."""


def _arrive(group: Group, name: str, seconds: float | None) -> None:
    """Wait until every rank of `group` has come here; the store counts them, so no collective can be half-entered."""
    where, limit, start = group.whereabouts, seconds or group.timeout_s, time.monotonic()
    count = where.enter(group.key, name)
    key = f"barrier/{group.key}/{count}"
    if where.store.add(key, 1) == group.size:
        where.store.set(f"{key}/done", name)
    while True:
        left = limit - (time.monotonic() - start)
        if left <= 0:
            raise where.explain(group, name, count, time.monotonic() - start)
        try:
            where.store.wait([f"{key}/done"], timedelta(seconds=min(_SLICE_S, left)))
            break
        except dist.DistStoreError:
            _raise_if_peer_failed(group, name)
    where.leave()


def _raise_if_peer_failed(group: Group, name: str) -> None:
    failures = group.whereabouts.failures(group.ranks)
    if failures:
        raise peer_failed(name, failures)


def _finish(group: Group, name: str, work: Any, seconds: float | None, patient: bool = False) -> None:
    """Wait for `work`, a collective on the control group that `enter` has announced.

    `patient`: the deadline counts from the last sign of life of those that have not come.
    """
    where, limit, start = group.whereabouts, seconds or group.timeout_s, time.monotonic()
    count, heard = where._counts[group.key], start
    while True:
        left = limit - (time.monotonic() - heard)
        if left <= 0 and patient and (silence := where.silence(group, count)) < limit:
            heard, left = time.monotonic() - silence, limit - silence
        if left <= 0:
            raise where.explain(group, name, count, time.monotonic() - start)
        ended = work.is_completed()
        try:
            work.wait(timedelta(seconds=min(_SLICE_S, left)))
            break
        except RuntimeError as error:
            # A slice that ran out is no error; one that had ended before the wait began has failed itself.
            if ended or not _is_timeout(error):
                raise where.explain(group, name, count, time.monotonic() - start) from error
            _raise_if_peer_failed(group, name)
    where.leave()


def _is_timeout(error: RuntimeError) -> bool:
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def barrier(group: Group, name: str, seconds: float | None = None) -> None:
    """Return when every rank of `group` has called it; `name` says what for, `seconds` is the deadline.

    Raises CollectiveTimeout naming the missing ranks, or PeerFailed with a peer's traceback.
    """
    if group.size > 1:
        _arrive(group, name, seconds)


def _all_reduce(group: Group, value: Any, op: Any, name: str, seconds: float | None) -> Any:
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
    if group.size > 1:
        buffer = tensor.detach().to("cpu", copy=True)
        group.whereabouts.enter(group.key, name)
        work = dist.all_reduce(buffer, op=op, group=group.control_group, async_op=True)
        _finish(group, name, work, seconds)
        tensor = buffer.to(tensor.device)
    return tensor if isinstance(value, torch.Tensor) else type(value)(tensor.item())


def all_reduce_sum(group: Group, value: Any, name: str, seconds: float | None = None) -> Any:
    """Sum of `value` over the ranks of `group`: a tensor (a new one comes back), int or float (added in float64)."""
    return _all_reduce(group, value, dist.ReduceOp.SUM, name, seconds)


def all_reduce_max(group: Group, value: Any, name: str, seconds: float | None = None) -> Any:
    """Largest `value` over the ranks of `group`: a tensor (element by element), int or float."""
    return _all_reduce(group, value, dist.ReduceOp.MAX, name, seconds)


def wait_for_all(group: Group, value: int, name: str, silence_s: float) -> int:
    """Largest `value` over the ranks of `group`, for ranks that come when work of unknown length is done.

    Waits as long as anything is heard of those that are missing: `silence_s` is the deadline, from the last sign of
    life of any of them. Raises CollectiveTimeout, or PeerFailed, like every collective here.
    """
    if group.size == 1:
        return value
    buffer, options = torch.tensor([value], dtype=torch.int64), dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # torch's stubs name the wrong one
    # gloo's own deadline knows no patience; that of this wait holds.
    options.timeout = timedelta(days=365)
    group.whereabouts.enter(group.key, name)
    _finish(group, name, group.control_group.allreduce([buffer], options), silence_s, patient=True)
    return int(buffer.item())


def broadcast_object(group: Group, value: Any, name: str, source: int = 0, seconds: float | None = None) -> Any:
    """Return what rank `source` (position in `group`) passed as `value`; the other ranks' values are ignored."""
    if group.size == 1:
        return value
    _arrive(group, name, seconds)
    box = [value]
    with explain_timeouts(group, name):
        dist.broadcast_object_list(box, group=group.control_group, group_src=source)
    return box[0]


def gather_objects(group: Group, value: Any, name: str, seconds: float | None = None) -> list[Any]:
    """Return every rank's `value` in group order, on every rank; values are pickled."""
    if group.size == 1:
        return [value]
    _arrive(group, name, seconds)
    found: list[Any] = [None] * group.size
    with explain_timeouts(group, name):
        dist.all_gather_object(found, value, group=group.control_group)
    return found


@contextmanager
def explain_timeouts(group: Group, name: str) -> Iterator[None]:
    """Turn a collective's timeout or lost connection inside the block into one that names the missing rank.

    For collectives we do not own: Megatron's schedules, optimizer and checkpoint calls.
    """
    where, start = group.whereabouts, time.monotonic()
    count = where.enter(f"phase/{group.key}", name)
    as_phase = Group(f"phase/{group.name}", group.ranks, group.rank, None, None, group.whereabouts, group.timeout_s)
    try:
        yield
    except (CollectiveTimeout, PeerFailed):
        raise
    except RuntimeError as error:
        if group.size == 1 or not _is_communication(error):
            raise
        raise where.explain(as_phase, name, count, time.monotonic() - start) from error
    where.leave()


def _is_communication(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(w in text for w in ("gloo", "nccl", "timed out", "connection closed by peer", "connection reset"))


@contextmanager
def deadline(group: Group, name: str, seconds: float | None = None) -> Iterator[None]:
    """Like `explain_timeouts`, and past `seconds` the explanation is printed; half as long again ends the process.

    A process stuck in native code cannot be interrupted from Python: stacks are dumped and it leaves with
    `EXIT_STUCK`, which lets the launcher tear the others down.
    """
    limit, store = seconds or group.timeout_s, None
    if group.size > 1:
        # An own connection: the main thread may hold the other one while it waits.
        store = group.whereabouts.store.clone()  # type: ignore[attr-defined]
    done = threading.Event()

    def watch() -> None:
        start = time.monotonic()
        if done.wait(limit):
            return
        where = group.whereabouts
        as_phase = Group(f"phase/{group.name}", group.ranks, group.rank, None, None, where, limit)
        count = where._counts.get(f"phase/{group.key}", 0)
        reason: Any = f'"{name}" is not done'
        if store is not None:
            reason = where.explain(as_phase, name, count, time.monotonic() - start, store)
        print(f"deadline of {limit:.0f} s passed: {reason}", file=sys.stderr, flush=True)
        if done.wait(limit / 2):
            return
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(f'stuck in "{name}" for {1.5 * limit:.0f} s; ending this process', file=sys.stderr, flush=True)
        os._exit(EXIT_STUCK)

    watcher = threading.Thread(target=watch, name=f"deadline {name}", daemon=True)
    watcher.start()
    try:
        with explain_timeouts(group, name):
            yield
    finally:
        done.set()
        watcher.join()


@contextmanager
def raise_everywhere(group: Group, name: str, seconds: float | None = None) -> Iterator[None]:
    """Make an exception of one rank inside the block an exception of every rank of `group`.

    The rank that failed raises its own error; the others raise PeerFailed with that rank's traceback, or the same
    UserError. A rank that
    waits in one of this module's collectives learns of it within a second.
    """
    try:
        yield
    except PeerFailed:
        raise
    except BaseException as error:
        if group.size > 1:
            group.whereabouts.fail(traceback.format_exc(), error if isinstance(error, UserError) else None)
        raise
    if group.size > 1:
        _arrive(group, f"end of {name}", seconds)
