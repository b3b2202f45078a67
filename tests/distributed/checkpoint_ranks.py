"""Ranks of the checkpoint tests: a tiny model that is trained, saved, killed and resumed in several layouts."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

from ra3_megatron.checkpoint.capture import model_state, synchronise_parameters
from ra3_megatron.checkpoint.distributed import sharding_metadata
from ra3_megatron.checkpoint.hashing import ParameterSums, hash_parameters, merge_sums
from ra3_megatron.checkpoint.manifest import PARTIAL, find_latest
from ra3_megatron.checkpoint.state import TrainState
from ra3_megatron.checkpoint.store import CheckpointStore, SaveEvent
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.sections import CheckpointConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine

SEQ, WINDOWS, VOCAB = 32, 4, 101
ARCH = Architecture("qwen2", 4, 48, 4, 2, 12, 96, VOCAB, tied_embeddings=True, qkv_bias=True, max_positions=256)
EXPERTS = Architecture(
    "qwen3_moe", 4, 48, 4, 2, 12, 96, VOCAB, False, False, True, max_positions=256,
    num_experts=4, experts_per_token=2, expert_ffn_hidden_size=20, norm_topk_prob=True,
)  # fmt: skip


def batch(step: int, index: int) -> TrainBatch:
    """Window `index` of global batch `step`."""
    ids = torch.randint(VOCAB, (SEQ + 1,), generator=torch.Generator().manual_seed(100 * step + index))
    return TrainBatch(
        input_ids=ids[:-1],
        labels=ids[1:],
        position_ids=torch.arange(SEQ),
        cu_seqlens=torch.tensor([0, SEQ], dtype=torch.int32),
        max_seqlen=SEQ,
        weights={"cross_entropy": torch.ones(SEQ)},
    )


def build(
    parallel: Parallel, layout: dict[str, Any], precision: str = "fp32", seed: int = 1, arch: Architecture = ARCH
) -> TrainEngine:
    """An engine over the tiny model; `seed` gives its random weights."""
    config = config_from_dict(
        {
            "parallel": layout,
            "train": {"steps": 100, "seq_length": SEQ, "micro_batch_size": 1, "global_batch_size": WINDOWS},
            "model": {"vocab_multiple": 8, "precision": precision},
            "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        }
    )
    seed_everything(seed, parallel)
    chunks = build_model(arch, config.model, parallel)
    return TrainEngine(config, arch, parallel, chunks, [cross_entropy_component()], total_steps=100)


def train(engine: TrainEngine, step: int) -> float:
    """Take optimizer step `step`; its loss, nats per token."""
    mine = range(engine.parallel.data_rank, WINDOWS, engine.parallel.sizes.data)
    return engine.train_step([batch(step, i) for i in mine], step=step).loss


def open_store(folder: Path | str, parallel: Parallel, arch: Architecture = ARCH, **config: Any) -> CheckpointStore:
    """A store with a short deadline."""
    settings = CheckpointConfig(**{"timeout_s": 60.0, "keep_last": 10, **config})
    return CheckpointStore(folder, settings, parallel, architecture=arch)


def save(store: CheckpointStore, engine: TrainEngine, step: int) -> SaveEvent | None:
    """Checkpoint of `step` with data position and an extra."""
    state = TrainState("sft", step=step, samples=step * WINDOWS, data={"fingerprint": "f00d", "position": step})
    return store.save(step, engine.chunks, engine.optimizer, engine.scheduler, state, {"baseline": 0.25 * step})


def load(store: CheckpointStore, engine: TrainEngine) -> Any:
    """Load the newest complete checkpoint."""
    info = store.latest()
    assert info is not None, "no complete checkpoint"
    return store.load(info, engine.chunks, engine.optimizer, engine.scheduler, data_fingerprint="f00d")


def optimizer_hash(engine: TrainEngine) -> str:
    """Hash of main parameters and moments, the same for every layout."""
    states = model_state(engine.chunks, engine.parallel)
    states = engine.optimizer.sharded_state_dict(states, metadata=sharding_metadata(engine.parallel))
    apply_factories(states)
    sums = ParameterSums()
    for s in nested_values(states):
        if isinstance(s, ShardedTensor) and is_main_replica(s.replica_id):
            data = s.data[(None,) * s.prepend_axis_num]
            sums.add(s.key, data, s.global_offset, s.global_shape, VOCAB if s.allow_shape_mismatch else None)
    return merge_sums(gather_objects(engine.parallel.world, sums, "hash of the optimizer")).hexdigest()


def expert_sums(engine: TrainEngine) -> list[float]:
    """One number of every matrix of this rank's experts."""
    named = [pair for chunk in engine.chunks for pair in unwrap(chunk).named_parameters()]
    return [float(weight.detach().double().sum()) for name, weight in named if "local_experts" in name]


def draws() -> list[float]:
    """One number of every generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def facts(engine: TrainEngine) -> dict[str, Any]:
    """Hashes, numbers drawn, losses of steps 3 to 5 and the hash after them."""
    synchronise_parameters(engine.chunks)
    known: dict[str, Any] = {
        "parameters": hash_parameters(engine.chunks, engine.parallel, VOCAB),
        "optimizer": optimizer_hash(engine),
        "lr_steps": engine.scheduler.num_steps,
        "draws": draws(),
        "losses": [train(engine, step) for step in (3, 4, 5)],
    }
    synchronise_parameters(engine.chunks)
    return known | {"after": hash_parameters(engine.chunks, engine.parallel, VOCAB)}


# ---------------------------------------------------------------- layouts


def write_layouts(folder: str, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per layout: two steps, a background save, then on without a pause; what a resumed run must reproduce."""
    found = {}
    for name, given in layouts.items():
        layout, precision, arch = _split(given)
        with initialize(config_from_dict({"parallel": layout}).parallel) as parallel:
            engine = build(parallel, layout, precision, arch=arch)
            experts = expert_sums(engine)
            for step in (1, 2):
                train(engine, step)
            store = open_store(Path(folder) / name, parallel, arch)
            save(store, engine, 2)
            found[name] = facts(engine) | {"experts": experts}
            event = store.drain()
            assert event is not None
            assert event.ok, event.message
    return found


def read_layouts(folder: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Per case (source, layout): load the source's checkpoint into a differently seeded model of that layout."""
    found = {}
    for source, name, given in cases:
        layout, precision, arch = _split(given)
        with initialize(config_from_dict({"parallel": layout}).parallel) as parallel:
            engine = build(parallel, layout, precision, seed=77, arch=arch)
            loaded = load(open_store(Path(folder) / source, parallel, arch), engine)
            found[f"{source}->{name}"] = facts(engine) | {
                "extras": loaded.extras,
                "random_restored": loaded.random_restored,
                "samples": loaded.state.samples,
            }
    return found


def _split(given: dict[str, Any]) -> tuple[dict[str, Any], str, Architecture]:
    layout = dict(given)
    return layout, layout.pop("precision", "fp32"), EXPERTS if layout.pop("experts", False) else ARCH


# ---------------------------------------------------------------- failures


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: writes fail with EFBIG, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def one_rank_cannot_write(folder: str) -> dict[str, Any]:
    """Rank 1's disk refuses one background save; then everything works again."""
    with initialize(config_from_dict({"parallel": {}}).parallel) as parallel:
        engine = build(parallel, {})
        store = open_store(folder, parallel)
        train(engine, 1)
        save(store, engine, 1)
        first = store.drain()
        train(engine, 2)
        size = 4096 if parallel.rank == 1 else resource.RLIM_INFINITY
        with small_files(size):
            save(store, engine, 2)
            loss = train(engine, 3)
            failed = store.drain()
        # The other rank may be at step 3 already; what must be gone is the folder of the failed save.
        partial = [p.name for p in Path(folder).glob(f"*2{PARTIAL}")]
        save(store, engine, 3)
        last = store.drain()
        info = store.latest()
        assert first is not None and failed is not None and last is not None and info is not None  # noqa: PT018
        return {
            "ok": [first.ok, failed.ok, last.ok],
            "message": failed.message,
            "partial": partial,
            "children": [p.name for p in multiprocessing.active_children()],
            "loss": loss,
            "latest": info.step,
            "steps": sorted(p.name for p in Path(folder).iterdir()),
        }


# ---------------------------------------------------------------- kill -9


def kill_rounds(folder: str, rounds: int, seed: int) -> dict[str, Any]:
    """Kill a run that saves all the time, `rounds` times at random moments; resume it after each kill.

    Every run is a fork of this process, which has imported everything and opened nothing.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    root, rng = Path(folder), random.Random(seed)
    resumed, torn = [], 0
    for _ in range(rounds):
        begun = root / "begun"
        begun.write_text("")
        child = _fork(_train_for_ever, root)
        saves = rng.choice((2, 3))
        _wait(lambda: len(begun.read_text()) >= saves, 60)  # noqa: B023
        # The last of them has just been handed to its writer; a write takes some 50 ms on an idle machine.
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += any((root / "kept").glob(f"*{PARTIAL}"))
        info, messages = find_latest(root / "kept")
        assert not messages, messages
        resumed.append(info.step if info else 0)
    lines = [json.loads(line) for line in (root / "hashes.jsonl").read_text().splitlines()]
    steps = max(resumed)
    child = _fork(_train_without_pause, root, steps)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"uninterrupted run ended with status {status}"
    reference = json.loads((root / "reference.json").read_text())
    left = [p.name for p in (root / "kept").glob(f"*{PARTIAL}")]
    return {"resumed": resumed, "torn": torn, "loaded": lines, "reference": reference, "left": left}


def _fork(function: Any, *args: Any) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return child


def _wait(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {seconds} s")
        time.sleep(0.01)


def _train_for_ever(root: Path) -> None:
    with initialize(config_from_dict({"parallel": {}}).parallel) as parallel:
        engine = build(parallel, {}, seed=1)
        store = open_store(root / "kept", parallel, keep_last=2)
        step = 0
        if store.latest() is not None:
            step = load(store, engine).state.step
            with open(root / "hashes.jsonl", "a") as f:
                f.write(json.dumps([step, hash_parameters(engine.chunks, parallel)]) + "\n")
        while True:
            step += 1
            train(engine, step)
            save(store, engine, step)
            with open(root / "begun", "a") as f:
                f.write(".")


def _train_without_pause(root: Path, steps: int) -> None:
    with initialize(config_from_dict({"parallel": {}}).parallel) as parallel:
        engine, hashes = build(parallel, {}, seed=1), {}
        for step in range(1, steps + 1):
            train(engine, step)
            hashes[step] = hash_parameters(engine.chunks, parallel)
        (root / "reference.json").write_text(json.dumps(hashes))
