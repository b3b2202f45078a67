"""Sharded save and load over Megatron's distributed checkpoint format (`torch_dist`).

A checkpoint written by any TP/PP/CP/DP layout loads into any other. All functions are collective over all ranks.
"""

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling

from ra3_megatron.checkpoint.hashing import ParameterSums, merge_sums
from ra3_megatron.checkpoint.manifest import FileFacts, file_facts
from ra3_megatron.checkpoint.writer import ThreadSaveStrategy, ThreadWriter
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import fsync_path
from ra3_megatron.parallel.collectives import (
    all_reduce_max,
    broadcast_object,
    explain_timeouts,
    gather_objects,
    raise_everywhere,
)
from ra3_megatron.parallel.groups import Parallel

OPTIMIZER_FORMAT = "fully_reshardable"
"""Layout of the distributed optimizer's state in a checkpoint: like the parameters, so any layout loads it."""


class CheckpointWriteError(RuntimeError):
    """At least one rank could not write its part; the message carries the writers' tracebacks, by rank."""


def sharding_metadata(parallel: Parallel) -> dict[str, Any]:
    """Options for `sharded_state_dict` of models and optimizers, the same at save and load."""
    return {
        "distrib_optim_sharding_type": OPTIMIZER_FORMAT,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel.group("dp_cp").device_group,
    }


@dataclass(frozen=True)
class SaveResult:
    """A part of a checkpoint that is complete on disk on all ranks."""

    files: dict[str, FileFacts]
    """Every file, by its path below the folder."""
    sums: ParameterSums
    """Checksums of the hashed tensors as they were written."""
    write_s: float
    """Time from the copy until the slowest rank had written, seconds."""


class PendingSave:
    """A save whose data are copied and on their way to disk.

    The training step goes on; `progress` is called now and then, `finish` once. `timeout_s` is the deadline of the
    write, counted from the copy.
    """

    def __init__(self, folder: Path, writer: ThreadWriter, metadata: Any, parallel: Parallel, timeout_s: float) -> None:
        self.folder = folder
        self.staged_bytes = writer.staged_bytes
        self._writer = writer
        self._metadata = metadata
        self._parallel = parallel
        self._timeout_s = timeout_s
        self._started = time.monotonic()
        self._started_writing = False

    def start(self) -> None:
        """Start writing in the background."""
        self._started_writing = True
        self._writer.start()

    def progress(self) -> Literal["running", "ended", "expired"]:
        """Collective, does not wait for the disk: whether every rank's writer has ended, well or badly."""
        elapsed = time.monotonic() - self._started
        mine = 0 if self._writer.wait(0) else 1 if elapsed < self._timeout_s else 2
        # The slowest rank decides, so all ranks decide alike even when their clocks do not.
        worst = all_reduce_max(self._parallel.world, mine, "poll of the checkpoint writers")
        return ("ended", "running", "expired")[worst]

    def finish(self, seconds: float | None = None) -> SaveResult:
        """Collective: wait for the writers, at most `seconds` and never past the deadline, then complete the metadata.

        Raises CheckpointWriteError, on every rank alike, when a writer failed or has not ended by then.
        """
        if not self._started_writing:
            self._writer.write()
        left = self._timeout_s - (time.monotonic() - self._started)
        seconds = left if seconds is None else min(seconds, left)
        if self._writer.wait(seconds):
            written = self._writer.outcome()
            error = written.error
        else:
            written = None
            error = f"the writer of {self.folder} has not ended after {time.monotonic() - self._started:.0f} s"
        mine = (error, written, time.monotonic() - self._started)
        # Every rank waits up to the same deadline before it comes here.
        patience = max(0.0, seconds) + self._parallel.timeout_s
        parts = gather_objects(self._parallel.world, mine, "end of the checkpoint write", patience)
        failed = {rank: part[0] for rank, part in enumerate(parts) if part[0] is not None}
        raise_write_errors(self.folder, failed)
        files = {name: facts for _, part, _ in parts for name, facts in part.files.items()}
        results = [part.results for _, part, _ in parts]

        def complete() -> dict[str, FileFacts]:
            self._writer.finish(self._metadata, results)
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
            names = (".metadata", "metadata.json")
            fsync_path(self.folder)
            return {name: file_facts(self.folder / name) for name in names}

        files |= on_main(self._parallel, self.folder, complete)
        return SaveResult(files, merge_sums(part.sums for _, part, _ in parts), max(seconds for _, _, seconds in parts))


def raise_write_errors(folder: Path, failed: Mapping[int, str]) -> None:
    """Raise CheckpointWriteError with the traceback of every failed rank; nothing when none failed."""
    if failed:
        text = "\n".join(f"--- rank {rank} ---\n{trace.rstrip()}" for rank, trace in failed.items())
        raise CheckpointWriteError(f"checkpoint {folder} could not be written\n{text}")


def on_main(parallel: Parallel, folder: Path, action: Callable[[], Any]) -> Any:
    """Collective: run `action` on rank 0; its value comes back on every rank, its OSError as CheckpointWriteError."""
    value, error = None, None
    with raise_everywhere(parallel.world, "checkpoint files of rank 0"):
        if parallel.is_main:
            try:
                value = action()
            except (OSError, RuntimeError):
                error = traceback.format_exc()
        value, error = broadcast_object(parallel.world, (value, error), "checkpoint files of rank 0")
    raise_write_errors(folder, {0: error} if error else {})
    return value


def _quiet() -> None:
    """Hide, inside `catch_warnings`, what torch says about Megatron's way of calling it; no user can act on it."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    # Megatron reports the missing optional writer and an overwritten folder; neither concerns this writer.
    for name in ("serialization", "strategies.torch"):
        logging.getLogger(f"megatron.core.dist_checkpointing.{name}").setLevel(logging.ERROR)


def begin_save(
    folder: Path,
    sharded_state_dict: dict[str, Any],
    parallel: Parallel,
    hashed: Mapping[str, int | None] | None = None,
    timeout_s: float = 1800.0,
) -> PendingSave:
    """Collective: plan the save and copy this rank's part to host memory; nothing is written yet.

    `folder` exists. Every replica along data x context parallelism writes its share. `hashed` names the tensors whose
    checksums are wanted and how many rows of each count.
    """
    strategy = ThreadSaveStrategy(parallel.rank, hashed or {})
    wrapped = FullyParallelSaveStrategyWrapper(strategy, parallel.group("dp_cp").device_group)
    with explain_timeouts(parallel.world, f"plan of checkpoint {folder.name}"), warnings.catch_warnings():
        _quiet()
        dist_checkpointing.save(
            sharded_state_dict, str(folder), wrapped, async_sharded_save=True, async_strategy="mcore"
        )
    assert strategy.writer is not None
    return PendingSave(folder, strategy.writer, strategy.metadata, parallel, timeout_s)


def save_sharded(
    folder: Path | str,
    sharded_state_dict: dict[str, Any],
    parallel: Parallel,
    *,
    async_: bool = False,
    timeout_s: float = 1800.0,
) -> PendingSave | SaveResult:
    """Collective: write `sharded_state_dict` (Megatron's ShardedTensor, ShardedObject and plain values) to `folder`.

    Plain values must be the same on every rank. With `async_` a started `PendingSave` comes back once the data are
    copied, and its `finish` completes the checkpoint. Raises CheckpointWriteError on every rank when one fails.
    """
    folder = Path(folder)
    on_main(parallel, folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    pending = begin_save(folder, sharded_state_dict, parallel, timeout_s=timeout_s)
    if async_:
        pending.start()
        return pending
    return pending.finish()


def load_sharded(folder: Path | str, sharded_state_dict: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """Collective: fill `sharded_state_dict` from `folder`; the values come back in its structure.

    Plain values of the checkpoint come back too. Raises UserError when the folder holds no checkpoint or lacks an
    entry that is asked for.
    """
    folder = Path(folder)
    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} holds no distributed checkpoint (no .metadata); give the folder `dist` of one")
    with explain_timeouts(parallel.world, f"load of checkpoint {folder}"), warnings.catch_warnings():
        _quiet()
        # Megatron calls what a rank asks for and the checkpoint lacks "unexpected", and what nobody asks for "missing".
        values, _, lacking = dist_checkpointing.load(sharded_state_dict, str(folder), strict=StrictHandling.RETURN_ALL)
    # Modules of Transformer Engine ask for a state that checkpoints of torch layers have no place for.
    lacking = [key for key in lacking if not key.endswith("_extra_state")]
    if lacking:
        raise UserError(
            f"{folder} lacks {len(lacking)} entries this run needs, e.g. {sorted(lacking)[:4]}; "
            "it is a checkpoint of another model or without optimizer state"
        )
    return values
