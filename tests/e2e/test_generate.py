"""Rationale generation killed at any moment, and on several processes: the same files to the byte."""

import hashlib
import json
from pathlib import Path

import pytest

from ra3_megatron.parallel.groups import initialize
from tests.e2e.forked import ForkServer
from tests.e2e.generating import write_start

STAGE = "04-ra3-generate-1"
TARGET = "tests.e2e.generating:generate"


def prepare_start(folder: str) -> None:
    with initialize() as parallel:
        write_start(Path(folder), parallel)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    folder = tmp_path_factory.mktemp("start")
    server.call("tests.e2e.test_generate:prepare_start", {"folder": str(folder)})
    return folder


@pytest.fixture(scope="module")
def whole(start: Path, server: ForkServer) -> Path:
    """A run on one process that nobody disturbed."""
    run = start / "whole" / "run"
    (result,) = server.call(TARGET, {"folder": str(start), "run": str(run)})
    assert result["thoughts"] > 30
    return run / STAGE


def files(stage: Path) -> dict[str, str]:
    """Checksum of every file of the stage's data."""
    data = stage / "data"
    return {
        str(p.relative_to(data)): hashlib.sha256(p.read_bytes()).hexdigest() for p in data.rglob("*") if p.is_file()
    }


def result(stage: Path) -> dict:
    """What DONE says, without what a clock has a say in."""
    found = json.loads((stage / "DONE").read_text())
    return {k: v for k, v in found.items() if k not in ("seconds", "tokens_per_second")}


def test_kills_lose_the_shards_in_flight_and_nothing_else(start: Path, whole: Path, server: ForkServer) -> None:
    """Half a shard taken for a whole one, shards drawn with other random numbers, a corpus without its dataset."""
    run = start / "killed" / "run"
    stage = run / STAGE
    moments = [f"data/shards/shard-0000{n:02d}.{kind}" for n, kind in ((0, "npz"), (3, "json"), (8, "parquet"))]
    finished = []
    for moment in [*moments, "data/.corpus.*.tmp/train/ids.bin", "data/report.json"]:
        (ended,) = server._job(
            {
                "target": TARGET,
                "arguments": {"folder": str(start), "run": str(run)},
                "world": 1,
                "timeout": 60,
                "kill_when": [str(stage), moment],
            }
        )
        assert ended.code in (0, -9), ended.err[-3000:]
        finished.append(len(list(stage.glob("data/shards/*.json"))))
    # The later kills fall into the joining, which may have removed its shards by then.
    assert finished[:3] == sorted(finished[:3])
    assert finished[1] >= 4
    server.call(TARGET, {"folder": str(start), "run": str(run)})
    assert files(stage) == files(whole)
    assert result(stage) == result(whole)


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_processes_give_what_one_gives(tensor: int, start: Path, whole: Path, server: ForkServer) -> None:
    """Two replicas share the shards, or two processes the model: shards doubled, missing, or in another order."""
    run = start / f"two-{tensor}" / "run"
    arguments = {"folder": str(start), "run": str(run), "parallel": {"tensor": tensor}}
    results = server.call(TARGET, arguments, world=2)
    assert results[0] == results[1]
    if tensor == 1:
        assert files(run / STAGE) == files(whole)
        assert result(run / STAGE) == result(whole)
    else:
        # Sums over two halves round differently; the ids are the same.
        assert result(run / STAGE)["fingerprint"] == result(whole)["fingerprint"]
