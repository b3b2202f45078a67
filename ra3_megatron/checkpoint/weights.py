"""Model weights of a checkpoint folder, imported or trained, whatever layout wrote it.

`CheckpointModel` reads full tensors one by one and needs neither ranks nor a model; `load_weights` fills the model
chunks of this rank in any layout.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.checkpoint.capture import model_state, put_back_models
from ra3_megatron.checkpoint.distributed import load_sharded
from ra3_megatron.checkpoint.hashing import ParameterSums, parameter_sums
from ra3_megatron.checkpoint.hf_mapping import VOCABULARY_KEYS, Unit, units
from ra3_megatron.checkpoint.hf_stream import CheckpointTensors
from ra3_megatron.checkpoint.manifest import ARCHITECTURE
from ra3_megatron.checkpoint.state import read_architecture, refuse_other_architecture
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import DONE, is_done
from ra3_megatron.parallel.groups import Parallel

log = logging.getLogger(__name__)


def read_done(checkpoint: Path) -> dict[str, Any]:
    """The JSON in a checkpoint's DONE; UserError when the folder is no finished checkpoint."""
    if not is_done(checkpoint):
        what = "it is unfinished or not a checkpoint" if checkpoint.is_dir() else "the folder does not exist"
        raise UserError(f"no checkpoint at {checkpoint}: {what} (no {DONE}); choose a folder that has one")
    try:
        facts = json.loads((checkpoint / DONE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{checkpoint / DONE} is not valid JSON ({error}); choose another checkpoint") from None
    if not isinstance(facts, dict):
        raise UserError(f"{checkpoint / DONE} holds no JSON object; choose another checkpoint")
    return facts


class BackgroundSums:
    """Hash the model's tensors on other cores while this one reads and writes them.

    Use as a context manager. The result is what `parameter_sums` gives for the loaded model in any layout. As many
    tensors as there are workers (at most 4), and one more, are kept in memory.
    """

    def __init__(self) -> None:
        self._sums = ParameterSums()
        self._workers = min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers, "parameter-sums")
        self._pending: deque[Future[ParameterSums]] = deque()

    def __enter__(self) -> "BackgroundSums":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, unit: Unit, tensor: Tensor, arch: Architecture) -> None:
        """Queue one full Megatron tensor; it must not change afterwards."""
        self._pending.append(self._pool.submit(_sums_of, unit, tensor, arch))
        while len(self._pending) > self._workers:
            self._sums.merge(self._pending.popleft().result())

    def result(self) -> ParameterSums:
        """Sums of everything added."""
        while self._pending:
            self._sums.merge(self._pending.popleft().result())
        return self._sums


def _sums_of(unit: Unit, tensor: Tensor, arch: Architecture) -> ParameterSums:
    sums = ParameterSums()
    whole = [*unit.axes(arch), *tensor.shape]
    sums.add(unit.key, tensor[(None,) * len(unit.at)], [*unit.at, *[0] * tensor.dim()], whole)
    return sums


class CheckpointModel:
    """The model's weights in a checkpoint folder, by unit; checked to be complete at construction."""

    def __init__(self, checkpoint: Path | str):
        self.checkpoint = Path(checkpoint)
        self.done = read_done(self.checkpoint)
        self.architecture = read_architecture(self.checkpoint / ARCHITECTURE)
        self._tensors = CheckpointTensors(self.checkpoint / "dist")
        self._check()

    def _check(self) -> None:
        stored = self._tensors.shapes
        problems = []
        expected = set()
        for unit in units(self.architecture):
            key, at = self._place(unit)
            expected.add(key)
            axes = unit.axes(self.architecture)
            shape = (*axes[len(axes) - len(at) :], *unit.rule.shape(self.architecture))
            if key not in stored:
                problems.append(f"{unit.name} is missing")
                continue
            found = stored[key]
            padded = key in VOCABULARY_KEYS and found[0] >= shape[0]
            if (found[1:] if padded else found) != (shape[1:] if padded else shape):
                problems.append(f"{unit.name}: {key} is {list(found)} instead of {list(shape)}")
        problems += [f"{key} is extra" for key in self._tensors.model_keys() if key not in expected]
        if problems:
            raise UserError(
                f"{self.checkpoint}: the stored tensors do not match architecture.json: {'; '.join(problems[:8])}"
                f"{f' and {len(problems) - 8} more' if len(problems) > 8 else ''}; choose another checkpoint"
            )

    def _place(self, unit: Unit) -> tuple[str, tuple[int, ...]]:
        """Key of a unit and its place on the first axes; Megatron can also store every layer under its own key."""
        if unit.layer_key in self._tensors.shapes:
            return unit.layer_key, unit.at[1:]
        return unit.key, unit.at

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the embedding, which stands for the model."""
        return self._tensors.dtype(VOCABULARY_KEYS[0])

    def read(self, unit: Unit) -> Tensor:
        """One full Megatron tensor, without vocabulary padding."""
        key, at = self._place(unit)
        return self._tensors.read(key, at, unit.rule.shape(self.architecture))

    def hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and tensors, in the order of `hf_shapes`, in the stored dtype.

        Raises UserError after the last one when they do not have the hash in DONE: discard what was made of them.
        """
        with BackgroundSums() as sums:
            for unit in units(self.architecture):
                names = unit.hf_shapes(self.architecture)
                tensor = self.read(unit)
                sums.add(unit, tensor, self.architecture)
                yield from zip(names, unit.rule.split(tensor, self.architecture), strict=True)
            check_hash(self.checkpoint, self.done, sums.result())


def load_weights(
    checkpoint: Path | str,
    model_chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    parallel: Parallel,
    *,
    verify: bool = True,
) -> None:
    """Collective: fill the model chunks of this rank from a checkpoint folder, in any layout and parameter dtype.

    Rows that pad the vocabulary become zero. Raises UserError when the folder is no finished checkpoint or holds
    another model, and with `verify` when the parameters do not have the hash in DONE (if the dtypes are the same).
    """
    folder = Path(checkpoint)
    done = read_done(folder)
    refuse_other_architecture(read_architecture(folder / ARCHITECTURE), architecture, f"checkpoint {folder}")
    put_back_models(model_chunks, load_sharded(folder / "dist", model_state(model_chunks, parallel), parallel))
    if verify:
        check_hash(folder, done, parameter_sums(model_chunks, parallel, architecture.vocab_size))


def check_hash(folder: Path, done: dict[str, Any], sums: ParameterSums) -> None:
    """Raise UserError when parameters read from `folder` do not have the hash its DONE names.

    Parameters loaded as another dtype cannot be compared; that is logged.
    """
    if sums.dtypes != done.get("parameter_dtypes"):
        log.info("%s is stored as %s, loaded as %s", folder, done.get("parameter_dtypes"), sums.dtypes)
    elif sums.hexdigest() != done.get("parameters_sha256"):
        raise UserError(
            f"checkpoint {folder}: the parameters have hash {sums.hexdigest()}, {done.get('parameters_sha256')} was "
            "saved; the files are damaged: import again or use another checkpoint"
        )
