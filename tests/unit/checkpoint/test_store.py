"""The store on one process: damage, retention, failing disks, deadlines."""

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ra3_megatron.checkpoint.distributed import SaveResult, load_sharded, save_sharded
from ra3_megatron.checkpoint.hashing import hash_parameters
from ra3_megatron.checkpoint.manifest import find_latest, step_folder
from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import CheckpointConfig, ModelConfig, ParallelConfig
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.parallel.launch import Launch

ARCH = Architecture("qwen2", 2, 32, 4, 2, 8, 64, 101, max_positions=64)


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with initialize(ParallelConfig(timeout_s=20), Launch(0, 1, 0, 1, "alone", None, None)) as handle:
        seed_everything(1, handle)
        yield handle


@pytest.fixture(scope="module")
def model(parallel: Parallel) -> list[torch.nn.Module]:
    return build_model(ARCH, ModelConfig(), parallel)


def open_store(folder: Path, parallel: Parallel, cls: Any = CheckpointStore, **settings: Any) -> CheckpointStore:
    arch = settings.pop("architecture", ARCH)
    hf, failures = settings.pop("hf_folder", None), settings.pop("max_failures", 3)
    config = CheckpointConfig(**{"timeout_s": 20.0, **settings})
    return cls(folder, config, parallel, architecture=arch, hf_folder=hf, max_failures=failures)


def save(store: CheckpointStore, model: list[torch.nn.Module], step: int) -> Any:
    """A finished save of `step`, whose parameters are told apart by one element."""
    with torch.no_grad():
        next(model[0].parameters()).view(-1)[0] = float(step)
    state = TrainState("sft", step=step, data={"fingerprint": "f00d"})
    return store.save(step, model, None, None, state, {"n": step}) or store.drain()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_save_and_load(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """The copy must be taken before training goes on: what is saved is the model at `save`, not at the write."""
    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        (hf / name).write_text("{}")
    store = open_store(tmp_path / "c", parallel, hf_folder=hf)
    state = TrainState("sft", step=7, tokens=11, data={"fingerprint": "f00d"})
    expected = hash_parameters(model, parallel, ARCH.vocab_size)
    assert store.save(7, model, None, None, state, {"ema": [1.5]}) is None
    assert store.busy
    with torch.no_grad():
        for p in model[0].parameters():
            p.add_(1.0)
    while (event := store.poll()) is None:
        time.sleep(0.005)
    assert event.ok and event.step == 7 and event.size > 0  # noqa: PT018
    info = store.latest()
    assert info is not None and info.verified  # noqa: PT018
    assert info.parameters_sha256 == expected
    assert names(info.folder / "hf") == ["config.json", "tokenizer.json"]
    done = json.loads((info.folder / "DONE").read_text())
    assert (done["kind"], done["step"], done["stage"]) == ("train", 7, "sft")
    loaded = store.load(info, model, None, None, data_fingerprint="f00d")
    assert hash_parameters(model, parallel, ARCH.vocab_size) == expected
    assert loaded.extras == {"ema": [1.5]}
    assert (loaded.state.tokens, loaded.random_restored) == (11, True)


def test_what_does_not_belong_is_refused(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """Another data set, another model or an optimizer that was never saved must not be loaded quietly."""
    store = open_store(tmp_path, parallel)
    save(store, model, 1)
    info = store.latest()
    assert info is not None
    with pytest.raises(UserError, match=r"f00d.*beef"):
        store.load(info, model, None, None, data_fingerprint="beef")
    other = Architecture("qwen2", 4, 32, 4, 2, 8, 64, 101, max_positions=64)
    with pytest.raises(UserError, match="num_layers: checkpoint 2, run 4"):
        open_store(tmp_path, parallel, architecture=other).load(info, model, None, None)
    with pytest.raises(UserError, match="no distributed checkpoint"):
        load_sharded(tmp_path, {}, parallel)
    with pytest.raises(UserError, match="keep_last is 0"):
        open_store(tmp_path, parallel, keep_last=0)


def _truncate(folder: Path) -> str:
    path = folder / "dist/__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    return "__0_0.distcp has .* bytes"


def _flip(folder: Path) -> str:
    path = folder / "dist/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "__0_0.distcp has SHA-256"


def _no_done(folder: Path) -> str:
    (folder / "DONE").unlink()
    return "DONE is missing"


def _garbage(folder: Path) -> str:
    size = (folder / "state.json").stat().st_size
    (folder / "state.json").write_bytes(b"\xff" * size)
    return "state.json"


def _no_shard(folder: Path) -> str:
    (folder / "dist/.metadata").unlink()
    return r"\.metadata is missing"


def _other_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"files": {}}')
    return "manifest.json has SHA-256"


@pytest.mark.parametrize("damage", [_truncate, _flip, _no_done, _garbage, _no_shard, _other_manifest])
def test_damage_is_passed_over(
    damage: Any,
    tmp_path: Path,
    parallel: Parallel,
    model: list[torch.nn.Module],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A damaged newest checkpoint ended the resume, or was loaded; the one before it must be taken, with a word."""
    store = open_store(tmp_path, parallel)
    for step in (1, 2):
        assert save(store, model, step).ok
    needle = damage(step_folder(tmp_path, 2))
    info = store.latest()
    assert info is not None
    assert info.step == 1
    assert re.search(f"step_00000002 is passed over: .*{needle}", caplog.text)
    alone, messages = find_latest(tmp_path)
    assert alone is not None
    assert alone.step == 1
    assert len(messages) == 1
    store.load(info, model, None, None)
    assert next(model[0].parameters()).view(-1)[0] == 1.0


def test_damage_after_the_check_is_refused(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """With the files unread (`latest` of another moment), the hash of what was loaded still has to agree."""
    store = open_store(tmp_path, parallel)
    save(store, model, 1)
    info = store.latest()
    assert info is not None
    shutil.copytree(info.folder, tmp_path / "copy")
    save(store, model, 2)
    shutil.rmtree(info.folder / "dist")
    shutil.copytree(step_folder(tmp_path, 2) / "dist", info.folder / "dist")
    with pytest.raises(UserError, match=r"have hash .* was saved"):
        store.load(info, model, None, None)


def test_retention(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """The last two and every fourth stay; after a roll-back the abandoned later ones go with the next save."""
    store = open_store(tmp_path, parallel, keep_last=2, keep_every=4)
    for step in range(1, 11):
        assert save(store, model, step).ok
    assert names(tmp_path) == [f"step_{n:08d}" for n in (4, 8, 9, 10)]
    save(store, model, 9)
    assert names(tmp_path) == [f"step_{n:08d}" for n in (4, 8, 9)]
    info = store.latest()
    assert info is not None
    assert info.step == 9


def test_left_overs_of_a_killed_run(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """Unfinished folders filled the disk; one that only lacked its name was thrown away."""
    save(open_store(tmp_path, parallel), model, 3)
    step_folder(tmp_path, 3).rename(tmp_path / "step_00000003.partial")
    (tmp_path / "step_00000004.partial/dist").mkdir(parents=True)
    (tmp_path / "step_00000001.0.deleted").mkdir()
    store = open_store(tmp_path, parallel)
    assert names(tmp_path) == ["step_00000003"]
    info = store.latest()
    assert info is not None
    assert info.step == 3


@pytest.mark.parametrize("async_save", [True, False])
def test_failing_disk(async_save: bool, tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """A save that failed took the run or the older checkpoints with it; only failures in a row may end the run."""
    store = open_store(tmp_path, parallel, async_save=async_save, max_failures=2)
    assert save(store, model, 1).ok
    for good in (2, 4):
        with small_files(5000):
            failed = save(store, model, good)
        assert not failed.ok
        assert "File too large" in failed.message
        assert "Traceback" in failed.message
        assert not list(tmp_path.glob("*.partial"))
        info = store.latest()
        assert info is not None
        assert info.step == good - 1
        assert save(store, model, good + 1).ok
    with small_files(5000):
        save(store, model, 6)
        with pytest.raises(UserError, match=r"2 checkpoints in a row .*\d+ bytes free"):
            save(store, model, 7)
    info = store.latest()
    assert info is not None
    assert info.step == 5


def test_free_space_is_checked_first(
    tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that cannot fit must not fill the disk first; the message gives needed and free bytes."""
    store = open_store(tmp_path, parallel)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    event = save(store, model, 1)
    assert not event.ok
    assert "1000 bytes free, the checkpoint needs" in event.message
    assert names(tmp_path) == []


class _StuckDisk(CheckpointStore):
    """Puts a pipe without a reader where the shard goes: opening it for writing blocks until somebody reads."""

    def _prepare(self, unfinished: Path, state: TrainState) -> None:
        super()._prepare(unfinished, state)
        os.mkfifo(unfinished / "dist/__0_0.distcp")


def test_stuck_disk_has_a_deadline(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """A worker that never came back made training wait for ever (Megatron-LM#6970)."""
    store = open_store(tmp_path, parallel, cls=_StuckDisk, timeout_s=0.6)
    state = TrainState("sft", step=1)
    assert store.save(1, model, None, None, state) is None
    assert store.poll() is None
    start = time.monotonic()
    event = store.drain(0.2)
    assert time.monotonic() - start < 3
    assert event is not None
    assert not event.ok
    assert "has not ended after" in event.message
    store.save(2, model, None, None, TrainState("sft", step=2))
    start = time.monotonic()
    while (event := store.poll()) is None:
        assert time.monotonic() - start < 5
        time.sleep(0.02)
    assert not event.ok
    assert names(tmp_path) == []
    fresh = open_store(tmp_path, parallel)
    assert save(fresh, model, 3).ok


def test_plain_sharded_save(tmp_path: Path, parallel: Parallel, model: list[torch.nn.Module]) -> None:
    """`save_sharded` in the background gives the same as in the foreground, and both load."""
    waited = save_sharded(tmp_path / "a", {"m": model[0].sharded_state_dict(), "x": [1, "y"]}, parallel)
    assert isinstance(waited, SaveResult)
    pending = save_sharded(tmp_path / "b", {"m": model[0].sharded_state_dict()}, parallel, async_=True)
    assert not isinstance(pending, SaveResult)
    assert set(pending.finish(20).files) == set(waited.files)
    for folder in ("a", "b"):
        values = load_sharded(tmp_path / folder, {"m": model[0].sharded_state_dict()}, parallel)
        for name, tensor in model[0].named_parameters():
            assert torch.equal(values["m"][name], tensor), name
    assert load_sharded(tmp_path / "a", {}, parallel)["x"] == [1, "y"]
