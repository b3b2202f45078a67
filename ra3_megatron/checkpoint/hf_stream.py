"""Write and read Megatron's distributed checkpoint format tensor by tensor, without a model and without ranks.

Megatron stores full tensors cut into chunks through `torch.distributed.checkpoint`; the layers of one kind form one
tensor with the layer as first axis, their experts one with layer and expert. Planning the chunks ourselves lets a
conversion hold one tensor in memory instead of a model, and lets `torch.distributed` stay uninitialised. What is
written is what `dist_checkpointing.load` expects: the tensors, Megatron's common state, and an empty extra state for
each module that has one.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError

_EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_EXTRA_STATE_OF_EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
"""Modules of a layer that ask for an `_extra_state` when a checkpoint is loaded (FP8 scales; None without FP8).

Which of them ask depends on the layer spec; an entry nobody asks for is never read.
"""


@dataclass(frozen=True)
class ChunkToWrite:
    """One chunk of a stored tensor, made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    """Shape of the chunk without the axes of layers and experts."""
    at: tuple[int, ...]
    """Position on these axes; empty for a tensor without them."""
    axes: tuple[int, ...]
    """Lengths of these axes."""
    make: Callable[[], Tensor]
    """Returns the chunk, `shape`, in the checkpoint's dtype."""


class _StreamingSavePlanner(SavePlanner):
    """Plan from shapes alone; make each tensor when it is written."""

    def __init__(self, chunks: Sequence[ChunkToWrite], objects: dict[str, Any], dtype: torch.dtype):
        self._objects = objects
        self._chunks: dict[tuple[str, tuple[int, ...]], ChunkToWrite] = {(c.key, c.at): c for c in chunks}
        self._axes = {c.key: len(c.axes) for c in chunks}
        self._dtype = dtype

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False, **kwargs: Any
    ) -> None:
        """Nothing to keep: the chunks were given at construction."""

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        for chunk in self._chunks.values():
            size = torch.Size((*chunk.axes, *chunk.shape))
            sizes = torch.Size((*(1 for _ in chunk.axes), *chunk.shape))
            offsets = torch.Size((*chunk.at, *(0 for _ in chunk.shape)))
            items.append(
                WriteItem(
                    index=MetadataIndex(chunk.key, offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                        properties=TensorProperties(dtype=self._dtype),
                        size=size,
                    ),
                )
            )
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], buffer)
            return buffer
        assert write_item.tensor_data is not None
        assert write_item.index.offset is not None
        fqn = write_item.index.fqn
        chunk = self._chunks[fqn, tuple(write_item.index.offset[: self._axes[fqn]])]
        tensor = chunk.make()
        assert tuple(tensor.shape) == chunk.shape, (chunk.key, tensor.shape, chunk.shape)
        assert tensor.dtype == self._dtype, (chunk.key, tensor.dtype, self._dtype)
        return tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()


def _objects(arch: Architecture) -> dict[str, Any]:
    """Non-tensor entries by storage key: Megatron's common state and the empty extra states."""
    objects: dict[str, Any] = {"common_state/shard_0_1": {}, "decoder.final_layernorm._extra_state/shard_0_1": None}
    for module in _EXTRA_STATE_MODULES:
        for layer in range(arch.num_layers):
            objects[f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.num_layers}"] = None
    for module in _EXTRA_STATE_OF_EXPERTS:
        for layer in range(arch.num_layers):
            for expert in range(arch.num_experts):
                shard = f"shard_{layer}.{expert}_{arch.num_layers}.{arch.num_experts}"
                objects[f"decoder.layers.{module}._extra_state/{shard}"] = None
    return objects


def write_model(folder: Path, chunks: Sequence[ChunkToWrite], arch: Architecture, dtype: torch.dtype) -> None:
    """Write `chunks` to `folder` as a distributed checkpoint; the tensors are made one after the other.

    An error of a chunk's `make`, or of the disk (OSError), comes out as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planner = _StreamingSavePlanner(chunks, _objects(arch), dtype)
    # Syncing is the caller's business: the folder still has a temporary name.
    writer = dcp.FileSystemWriter(str(folder), single_file_per_rank=True, sync_files=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as wrapped:  # torch's parcel of every rank's error; there is one rank
        raise wrapped.failures[0][0] from None
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}), encoding="utf-8"
    )


class _IntoTensors(LoadPlanner):
    """Read planned items into given tensors."""

    def __init__(self, targets: dict[str, tuple[Tensor, tuple[int, ...]]]):
        self._targets = targets

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing to keep: the targets were given at construction."""

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("items are planned by CheckpointTensors")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor, _ = self._targets[read_item.dest_index.fqn]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The data already lies in its target."""


class CheckpointTensors:
    """Tensors of a distributed checkpoint, whatever layout wrote it, read one at a time.

    Raises UserError when the folder is not a readable distributed checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._reader = dcp.FileSystemReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise UserError(
                f"{folder} is not a readable distributed checkpoint ({error}); choose another checkpoint of the run"
            ) from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._by_place: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of `key`."""
        return self._entry(key).properties.dtype

    def model_keys(self) -> Iterator[str]:
        """Keys of the model's own tensors, without optimizer and training state."""
        return (key for key in self.shapes if key.startswith(("embedding.", "decoder.", "output_layer.")))

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _chunks(self, key: str, at: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Stored pieces at a place on the first axes: sorted once for all places, of which experts make thousands."""
        count, chunks = len(at), self._entry(key).chunks
        if (key, count) not in self._by_place:
            places: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in chunks:
                # A piece of several places would be found at the first alone.
                if any(size != 1 for size in chunk.sizes[:count]):
                    return chunks
                places.setdefault(tuple(chunk.offsets[:count]), []).append(chunk)
            self._by_place[key, count] = places
        return self._by_place[key, count].get(at, [])

    def read(self, key: str, at: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Read the leading `shape` of `key` (rows behind it are vocabulary padding) at a place on its first axes.

        Raises UserError when the checkpoint's files are damaged.
        """
        entry = replace(self._entry(key), chunks=self._chunks(key, at))
        sizes = (*(1 for _ in at), *shape)
        offsets = (*at, *(0 for _ in shape))
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            raise UserError(
                f"{self._folder}: the stored pieces of {key} cover {covered} of {target.numel()} values; "
                "the checkpoint is incomplete, choose another one"
            )
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensors({key: (target, offsets)})).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self._folder}: cannot read {key} ({first}); choose another checkpoint") from None
        return target.reshape(shape)
