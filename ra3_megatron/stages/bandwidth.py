"""How fast all processes of a job can reduce: `python -m ra3_megatron.stages.bandwidth FLOOR_GB_S`, before a start.

Measured is an all-reduce over all processes and one over those of each node. The figure is the bus bandwidth as NCCL's
tests count it: bytes x 2 (n - 1) / n / seconds. Exit code 1 when a figure lies below the floor; nodes that are slow by
themselves are left word of, and stay out of the next attempt.
"""

import json
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from ra3_megatron.config.control import EXIT_CRASH, EXIT_DONE, STRAGGLERS_FILE, attempt_dir, write_outcome
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel, initialize

REPEATS = 5
"""All-reduces of which the fastest counts."""


def bus_gb_s(parallel: Parallel, group: dist.ProcessGroup, size: int) -> float:
    """Bus bandwidth of `group`, GB/s; infinite for one process, which has nobody to talk to."""
    count = dist.get_world_size(group)
    if count == 1:
        return float("inf")
    buffer = torch.ones(size // 4, device=parallel.device)
    dist.all_reduce(buffer, group=group)
    best = float("inf")
    for _ in range(REPEATS):
        parallel.synchronize()
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        parallel.synchronize()
        best = min(best, time.perf_counter() - start)
    return size * 2 * (count - 1) / count / best / 1e9


def node_groups(parallel: Parallel, timeout: timedelta) -> dist.ProcessGroup:
    """The group of this node's processes; every process makes every node's, in the same order."""
    mine = None
    per_node = parallel.launch.local_world
    for first in range(0, parallel.world_size, per_node):
        ranks = list(range(first, min(first + per_node, parallel.world_size)))
        made = dist.new_group(ranks, timeout=timeout)
        mine = made if parallel.rank in ranks else mine
    assert mine is not None
    return mine


def measure(floor: float) -> int:
    """Measure, print on the main process, and return the exit code. Takes seconds."""
    with initialize() as parallel:
        size = 256 << 20 if parallel.on_gpu else 8 << 20
        own = bus_gb_s(parallel, node_groups(parallel, timedelta(seconds=120)), size)
        whole = bus_gb_s(parallel, parallel.world.device_group, size)
        found = gather_objects(parallel.world, (socket.gethostname(), own, whole), "bandwidth")
        nodes = {host: min(o for h, o, _ in found if h == host) for host, _, _ in found}
        everybody = min(w for _, _, w in found)
    bad = {host: f"all-reduce within the node {value:.3g} GB/s" for host, value in nodes.items() if value < floor}
    slow = [f"{host}: {why}" for host, why in bad.items()]
    slow += [f"all nodes {everybody:.3g} GB/s"] if everybody < floor else []
    if parallel.is_main:
        if bad and (folder := attempt_dir()) is not None:
            atomic_write_text(folder / STRAGGLERS_FILE, json.dumps({"slow": bad}))
        print(f"all-reduce: {everybody:.3g} GB/s over {parallel.world_size} processes, floor {floor:g}", flush=True)
        if slow:
            write_outcome(EXIT_CRASH, f"all-reduce below the floor of {floor:g} GB/s: {', '.join(slow)}")
    return EXIT_CRASH if slow else EXIT_DONE


if __name__ == "__main__":
    try:
        limit = float(sys.argv[1])
    except (IndexError, ValueError):
        raise UserError("give the least bandwidth in GB/s: python -m ra3_megatron.stages.bandwidth 100") from None
    sys.exit(measure(limit))
