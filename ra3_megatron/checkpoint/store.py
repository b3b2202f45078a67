"""The checkpoints of one stage: saved in the background, verified, kept or removed, found again."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ra3_megatron.checkpoint.capture import (
    gather_state,
    layout,
    put_back_models,
    restore_random_states,
    wanted_state,
)
from ra3_megatron.checkpoint.distributed import (
    CheckpointWriteError,
    PendingSave,
    begin_save,
    load_sharded,
    on_main,
    raise_write_errors,
)
from ra3_megatron.checkpoint.fp8_state import requantise
from ra3_megatron.checkpoint.hashing import hashed_keys, model_shards, parameter_sums
from ra3_megatron.checkpoint.manifest import (
    ARCHITECTURE,
    DOOMED,
    PARTIAL,
    STATE,
    CheckpointInfo,
    DamagedCheckpoint,
    content_problem,
    doom,
    finish_folder,
    inspect,
    step_folder,
    step_folders,
)
from ra3_megatron.checkpoint.state import TrainState, read_architecture, refuse_other_architecture
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import DONE, atomic_write_text, is_done
from ra3_megatron.config.sections import CheckpointConfig
from ra3_megatron.parallel.collectives import all_reduce_sum, gather_objects
from ra3_megatron.parallel.groups import Parallel

log = logging.getLogger(__name__)

SPARE_BYTES = 16 << 20
"""Free space asked for beyond the state itself: metadata, tokenizer, a file system's own records."""


@dataclass(frozen=True)
class SaveEvent:
    """How a save ended."""

    step: int
    """Optimizer step of the checkpoint."""
    ok: bool
    """Whether the checkpoint is complete on disk."""
    seconds: float
    """Time from `save` until then, seconds; training went on meanwhile when it was in the background."""
    stall_s: float
    """Time `save` kept the training thread, seconds."""
    size: int
    """Bytes written; 0 when it failed."""
    message: str
    """Why it failed, with the writers' tracebacks; empty when it did not."""

    @property
    def text(self) -> str:
        """What people are told."""
        if self.ok:
            return f"checkpoint of step {self.step}: {self.size / 1e6:.1f} MB, stall {self.stall_s:.2f} s"
        return f"checkpoint of step {self.step} FAILED, training goes on: {self.message}"


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint gave besides the tensors it put into model and optimizer."""

    state: TrainState
    """Counters and positions."""
    extras: dict[str, Any]
    """Plain values given to `save`."""
    random_restored: bool
    """Whether the generators continue where they were; False when the parallel layout is another."""


@dataclass
class _Pending:
    state: TrainState
    unfinished: Path
    files: PendingSave
    started: float
    stall_s: float = 0.0


class CheckpointStore:
    """Checkpoints below `folder`, at most one of them being written. Every method is collective over all ranks.

    `hf_folder` gives config.json and tokenizer, which every checkpoint carries. Raises UserError after
    `max_failures` saves in a row that failed; a single failure is reported and training goes on.
    """

    def __init__(
        self,
        folder: Path | str,
        config: CheckpointConfig,
        parallel: Parallel,
        *,
        architecture: Architecture,
        hf_folder: Path | str | None = None,
        max_failures: int = 3,
    ) -> None:
        if config.keep_last < 1:
            raise UserError(f"checkpoint.keep_last is {config.keep_last}; at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self._config = config
        self._parallel = parallel
        self._architecture = architecture
        self._hf = Path(hf_folder) if hf_folder is not None else None
        self._max_failures = max_failures
        self._failures = 0
        self._pending: _Pending | None = None
        if self._hf is not None and not (self._hf / "config.json").is_file():
            raise UserError(f"{self._hf} holds no config.json; give the folder of a Hugging Face model")
        for message in on_main(parallel, self.folder, self._tidy):
            log.warning(message)

    # ---------------------------------------------------------------- saving

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    def save(
        self,
        step: int,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        lr_scheduler: Any,
        train_state: TrainState,
        extras: dict[str, Any] | None = None,
    ) -> SaveEvent | None:
        """Take a checkpoint of `step`; with `async_save` only the copy is waited for, and `poll` does the rest.

        Captured are parameters, optimizer (main parameters, moments, step, gradient scaler), schedule, all random
        generators and `train_state`; optimizer and schedule may be None. An earlier save that is still under way is
        waited for first. `extras` are plain values, the same on every rank. Returns the event of the save that ended
        in this call, if any.
        """
        assert step == train_state.step, f"step {step} but train_state.step {train_state.step}"
        earlier = self.drain()
        start = time.monotonic()
        state = replace(train_state, layout=layout(self._parallel))
        unfinished = step_folder(self.folder, step).with_suffix(PARTIAL)
        try:
            on_main(self._parallel, unfinished, lambda: self._prepare(unfinished, state))
            sharded = gather_state(model_chunks, optimizer, lr_scheduler, extras or {}, self._parallel)
            keys = hashed_keys(model_shards(model_chunks, values=False), self._architecture.vocab_size)
            files = begin_save(unfinished / "dist", sharded, self._parallel, keys, self._config.timeout_s)
            self._check_space(files.staged_bytes)
        except CheckpointWriteError as error:
            return self._failed(step, unfinished, error, start, time.monotonic() - start)
        self._pending = _Pending(state, unfinished, files, start)
        if not self._config.async_save:
            return self._complete()
        files.start()
        self._pending.stall_s = time.monotonic() - start
        return earlier

    def poll(self) -> SaveEvent | None:
        """Call at every step: completes a background save once all ranks have written, else returns at once."""
        if self._pending is None or self._pending.files.progress() == "running":
            return None
        return self._complete()

    def drain(self, seconds: float | None = None) -> SaveEvent | None:
        """End a save under way: wait for it, at most `seconds` (default: what is left of the save's own deadline).

        A save that has not ended by then counts as failed and is given up.
        """
        return self._complete(seconds) if self._pending is not None else None

    def _prepare(self, unfinished: Path, state: TrainState) -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "dist").mkdir(parents=True)
        atomic_write_text(unfinished / STATE, state.to_json())
        atomic_write_text(unfinished / ARCHITECTURE, json.dumps(asdict(self._architecture), indent=1))
        if self._hf is not None:
            copy_hf_files(self._hf, unfinished / "hf")

    def _check_space(self, staged: int) -> None:
        needed = all_reduce_sum(self._parallel.world, staged, "size of the checkpoint") + SPARE_BYTES

        def check() -> str | None:
            free = shutil.disk_usage(self.folder).free
            if free >= needed:
                return None
            return f"{self.folder} has {free} bytes free, the checkpoint needs {needed}; nothing was written"

        problem = on_main(self._parallel, self.folder, check)
        raise_write_errors(self.folder, {0: problem} if problem else {})

    def _complete(self, seconds: float | None = None) -> SaveEvent:
        pending, self._pending = self._pending, None
        assert pending is not None
        step, start = pending.state.step, time.monotonic()
        try:
            written = pending.files.finish(seconds)
            files = {f"dist/{name}": facts for name, facts in written.files.items()}
            facts = {
                "kind": "train",
                "stage": pending.state.stage,
                "step": step,
                "parameters_sha256": written.sums.hexdigest(),
                "parameter_dtypes": written.sums.dtypes,
            }
            final = step_folder(self.folder, step)
            info = on_main(
                self._parallel, pending.unfinished, lambda: finish_folder(pending.unfinished, final, files, facts)
            )
        except CheckpointWriteError as error:
            return self._failed(step, pending.unfinished, error, pending.started, pending.stall_s)
        self._failures = 0
        for message in on_main(self._parallel, self.folder, lambda: self._retain(step)):
            log.info(message)
        now = time.monotonic()
        # What this call waited is a stall too, in the foreground and when drained.
        return SaveEvent(step, True, now - pending.started, pending.stall_s + now - start, info.size, "")

    def _failed(self, step: int, unfinished: Path, error: Exception, started: float, stall_s: float) -> SaveEvent:
        self._failures += 1
        log.error("checkpoint of step %d failed (%d in a row): %s", step, self._failures, error)

        def clean() -> int:
            shutil.rmtree(unfinished, ignore_errors=True)
            return shutil.disk_usage(self.folder).free

        free = on_main(self._parallel, self.folder, clean)
        if self._failures >= self._max_failures:
            raise UserError(
                f"{self._failures} checkpoints in a row could not be written to {self.folder} ({free} bytes free); "
                f"the last error was:\n{error}\nfree some space or choose another folder, then run again: "
                "it resumes from the last complete checkpoint"
            ) from error
        return SaveEvent(step, False, time.monotonic() - started, stall_s, 0, str(error))

    # ---------------------------------------------------------------- keeping

    def _tidy(self) -> list[str]:
        """Remove what a killed run left: unfinished and half-deleted folders. A finished one is given its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        messages = []
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(PARTIAL) and is_done(path) and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))
                messages.append(f"checkpoint {path.with_suffix('')} was complete but not yet named; kept")
            elif path.name.endswith((PARTIAL, DOOMED)):
                shutil.rmtree(path)
                messages.append(f"{path} was left unfinished by an earlier run; removed")
        return messages

    def _retain(self, step: int) -> list[str]:
        """Delete what is not to be kept; checkpoints after `step` belong to a run that was rolled back."""
        every = self._config.keep_every
        kept = [s for s, folder in step_folders(self.folder) if s <= step and is_done(folder)][
            -self._config.keep_last :
        ]
        messages = []
        for s, folder in step_folders(self.folder):
            if s in kept or (s <= step and every > 0 and s % every == 0):
                continue
            why = (
                "not kept by keep_last and keep_every"
                if s <= step
                else f"later than step {step}, to which we rolled back"
            )
            try:
                doom(folder)
                messages.append(f"checkpoint {folder} removed: {why}")
            except OSError as error:
                # The new checkpoint is safe; an old one that stays only costs space.
                messages.append(f"checkpoint {folder} could not be removed ({error})")
        for path in self.folder.glob(f"*{DOOMED}"):
            shutil.rmtree(path, ignore_errors=True)
        return messages

    # ---------------------------------------------------------------- loading

    def latest(self) -> CheckpointInfo | None:
        """Newest checkpoint that is complete, or none; a damaged one is passed over with a message naming why.

        With `verify` the ranks share the reading of all files and compare their SHA-256.
        """
        folders = on_main(self._parallel, self.folder, lambda: [f for _, f in reversed(step_folders(self.folder))])
        for folder in folders:
            info = on_main(self._parallel, folder, partial(_inspect, folder))
            problem = info if isinstance(info, str) else self._content_problem(info)
            if problem is None:
                return replace(info, verified=self._config.verify)
            log.warning("checkpoint %s is passed over: %s", folder, problem)
        return None

    def _content_problem(self, info: CheckpointInfo) -> str | None:
        if not self._config.verify:
            return None
        mine = content_problem(info, self._parallel.rank, self._parallel.world_size)
        found = gather_objects(self._parallel.world, mine, "verification of the checkpoint", self._config.timeout_s)
        return next((p for p in found if p is not None), None)

    def load(
        self,
        info: CheckpointInfo,
        model_chunks: Sequence[torch.nn.Module],
        optimizer: Any,
        lr_scheduler: Any,
        *,
        data_fingerprint: str | None = None,
    ) -> Loaded:
        """Put a checkpoint into model, optimizer, schedule and generators, whatever layout wrote it.

        Raises UserError when it belongs to another model or, given `data_fingerprint`, to another data set, and when
        the parameters do not have the hash they had at saving.
        """
        if data_fingerprint is not None:
            info.state.refuse_other_data(data_fingerprint, f"checkpoint {info.folder}")
        self._refuse_damage(info)
        same = info.state.layout == layout(self._parallel)
        wanted = wanted_state(model_chunks, optimizer, same, self._parallel)
        values = load_sharded(info.dist, wanted, self._parallel)
        put_back_models(model_chunks, values)
        if optimizer is not None:
            optimizer.load_state_dict(values["optimizer"])
            requantise(model_chunks, optimizer)
        if lr_scheduler is not None:
            if "lr_scheduler" not in values:
                raise UserError(f"checkpoint {info.folder} holds no learning-rate schedule; load only its weights")
            lr_scheduler.load_state_dict(values["lr_scheduler"])
        self._refuse_other_hash(info, model_chunks)
        if same:
            restore_random_states(values["rng"], self._parallel)
        else:
            log.warning(
                "checkpoint %s was written by layout %s, this run has %s: random generators start from the run's seed",
                info.folder,
                info.state.layout,
                layout(self._parallel),
            )
        return Loaded(info.state, values["extras"], same)

    def _refuse_damage(self, info: CheckpointInfo) -> None:
        found = read_architecture(info.folder / ARCHITECTURE)
        refuse_other_architecture(found, self._architecture, f"checkpoint {info.folder}")
        problem = None if info.verified else self._content_problem(info)
        if problem is not None:
            raise UserError(f"checkpoint {info.folder} is damaged: {problem}; use an earlier one")

    def _refuse_other_hash(self, info: CheckpointInfo, model_chunks: Sequence[torch.nn.Module]) -> None:
        if not self._config.verify:
            return
        sums = parameter_sums(model_chunks, self._parallel, self._architecture.vocab_size)
        if tuple(sums.dtypes) != info.parameter_dtypes:
            log.warning(
                "parameters of %s are %s, the model's %s: their hash cannot be compared; the files' hashes were",
                info.folder,
                "/".join(info.parameter_dtypes),
                "/".join(sums.dtypes),
            )
        elif sums.hexdigest() != info.parameters_sha256:
            raise UserError(
                f"checkpoint {info.folder}: the parameters have hash {sums.hexdigest()} after loading, "
                f"{info.parameters_sha256} was saved; the files are damaged or the model is another: "
                "use an earlier checkpoint"
            )


def _inspect(folder: Path) -> CheckpointInfo | str:
    try:
        return inspect(folder)
    except DamagedCheckpoint as damage:
        return str(damage)


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer of a Hugging Face folder: every small file that holds no weights."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
        if path.is_file() and not weights and path.name != DONE and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
