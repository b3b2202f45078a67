"""One process of `ra3 doctor`'s collective self-test: BACKEND RANK WORLD FOLDER."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

DEADLINE = timedelta(seconds=60)


def probe(backend: str, rank: int, world: int, folder: str) -> None:
    """All-reduce the ranks' numbers over `backend` with a store in `folder`; raises if the sum is wrong."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=DEADLINE)
    try:
        value = torch.full((1024,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value)
        expected = world * (world + 1) / 2
        if not bool((value == expected).all()):
            raise RuntimeError(f"{backend} all-reduce gave {value[0].item()}, expected {expected}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    probe(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
