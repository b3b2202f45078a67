"""A virtual cluster for the session, ranks out of memory, and runs small enough to be restarted over and over."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster, why_not
from tests.slurm.runs import Runs

EVERYTHING = "RA3_SLURM_TESTS"
"""Variable: `all` runs the long tests too, as `make test-slurm` does."""

PREEMPTION = "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\nSlurmctldParameters=preempt_send_user_signal"
URGENT = "PartitionName=urgent Nodes=node[001-004] MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests wait for `make test-slurm`."""
    if os.environ.get(EVERYTHING) == "all":
        return
    for item in items:
        if "slurm" in item.path.parts and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="long: make test-slurm runs it"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes with eight GPUs each."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(conf=PREEMPTION, partitions=URGENT, words="GraceTime=30") as made:
        yield made


@pytest.fixture(scope="session")
def zygote(cluster: Cluster) -> Iterator[Path]:
    """The socket of the process that forks ranks."""
    path, log = cluster.folder / "zygote.sock", open(cluster.folder / "zygote.log", "wb")  # noqa: SIM115
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.zygote", str(path)], cwd=ROOT, env=env, stdout=log, stderr=log
    )
    end = time.monotonic() + 600
    while not path.exists():
        alive = process.poll() is None and time.monotonic() < end
        assert alive, (cluster.folder / "zygote.log").read_text()[-2000:]
        time.sleep(0.1)
    yield path
    process.terminate()
    process.wait(30)
    log.close()


@pytest.fixture(scope="session")
def runs(cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that share a prepared corpus, and the weights that each must end with; real ranks only where asked for."""
    return Runs(cluster, lambda: request.getfixturevalue("zygote"), tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: an empty queue, and no process on any node that a job has left behind."""
    yield
    if "cluster" not in request.fixturenames:
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    cluster.cancel_all()
    cluster.wait(lambda: not cluster.leftovers(), 120, f"orphans: {cluster.leftovers()}")
