"""Writes one rank's part of a checkpoint from a thread, after the state has been copied.

Megatron's own background save spawns a worker and a manager process per rank; both stay behind when the rank ends by
a signal. A thread cannot outlive its process, and file writes release Python's lock, so training goes on beside it.
"""

import dataclasses
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ra3_megatron.checkpoint.hashing import ParameterSums
from ra3_megatron.checkpoint.manifest import FileFacts, file_facts


class _Staged:
    """Hands the writer the copies that were taken, in the place of torch's planner."""

    def __init__(self, data: Mapping[Any, Any]) -> None:
        self._data = data

    def resolve_data(self, item: WriteItem) -> Any:
        return self._data[item.index]


@dataclass(frozen=True)
class Written:
    """What one rank's writer leaves behind: results when it succeeded, a traceback when it did not."""

    results: list[WriteResult]
    """Where every item lies, for the checkpoint's metadata."""
    files: dict[str, FileFacts]
    """Files written by this rank, by name."""
    sums: ParameterSums
    """Checksums of the parameters as they were written."""
    error: str | None = None
    """Traceback, or none."""


class ThreadWriter(FileSystemWriter):
    """torch's file writer, split in two: copy the data in the training thread, write the copies in another.

    One writer serves one save. The write never takes part in a collective.
    """

    can_run_decentralized_global_plan = True

    def __init__(self, folder: Path, rank: int, hashed: Mapping[str, int | None]) -> None:
        # per_thread_copy_ahead=0: the data are on the host already, torch need not overlap copies from the GPU.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.folder = folder
        self.staged_bytes = 0
        self._rank = rank
        self._hashed = hashed
        self._plan: SavePlan | None = None
        self._staged: dict[Any, Any] = {}
        self._written: Written | None = None
        self._thread: threading.Thread | None = None

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """Name this rank's files; ranks need no plan of the others since names cannot collide."""
        return dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{self._rank}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copy everything this rank writes to host memory; afterwards training may change its tensors."""
        self._plan = plan
        for item in plan.items:
            data: Any = planner.resolve_data(item)
            if item.type != WriteItemType.BYTE_IO:
                data = data.detach().to("cpu", copy=True)
            self.staged_bytes += data.nbytes if isinstance(data, torch.Tensor) else data.getbuffer().nbytes
            self._staged[item.index] = data

    def start(self) -> None:
        """Write in a thread. It is a daemon: a process that ends does not wait for a disk that hangs."""
        self._thread = threading.Thread(target=self.write, name=f"checkpoint {self.folder}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the write; whether it has ended."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))
            return not self._thread.is_alive()
        return self._written is not None

    def write(self) -> None:
        """Write and checksum; an error ends up in `outcome`, since nobody catches what a thread raises."""
        try:
            self._written = self._write()
        except BaseException:  # noqa: BLE001  a thread has no caller; the traceback reaches all ranks in `finish`
            self._written = Written([], {}, ParameterSums(), traceback.format_exc())
        finally:
            self._staged = {}

    def outcome(self) -> Written:
        """What the write left behind; only after `wait` said it has ended."""
        assert self._written is not None, "outcome() before the write has ended"
        return self._written

    def _write(self) -> Written:
        assert self._plan is not None, "write() before the data were prepared"
        sums = ParameterSums()
        for item in self._plan.items:
            if item.index.fqn in self._hashed:
                assert item.tensor_data is not None
                sums.add(
                    item.index.fqn,
                    self._staged[item.index],
                    tuple(item.tensor_data.chunk.offsets),
                    tuple(item.tensor_data.size),
                    self._hashed[item.index.fqn],
                )
        results: list[WriteResult] = []
        if self._plan.items:
            results = self.write_data(self._plan, _Staged(self._staged)).wait()  # type: ignore[arg-type]
        names = sorted({r.storage_data.relative_path for r in results})
        return Written(results, {name: file_facts(self.folder / name) for name in names}, sums)


class ThreadSaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format, written by a `ThreadWriter`.

    `async_save` plans (collective) and copies; starting the writer and collecting its results is the caller's part.
    """

    def __init__(self, rank: int, hashed: Mapping[str, int | None]) -> None:
        super().__init__()
        self._rank = rank
        self._hashed = hashed
        self.writer: ThreadWriter | None = None
        self.metadata: Any = None

    def async_save(
        self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        """Plan the save and copy this rank's part; `writer` and (on rank 0) `metadata` then hold the rest."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = ThreadWriter(Path(checkpoint_dir), self._rank, self._hashed)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        planned = save_state_dict_async_plan(mcore_to_pyt_state_dict(renamed, False), self.writer, None, 0, planner)
        self.metadata = planned[0][1]
        return AsyncRequest(async_fn=self.writer.write, async_fn_args=(), finalize_fns=[])
