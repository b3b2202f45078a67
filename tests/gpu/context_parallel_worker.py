"""Losses of a few steps with the processes sharing every sequence; rank 0 prints them."""

import sys

from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.parallel.groups import initialize
from tests.gpu.models import engine, losses

if __name__ == "__main__":
    context, precision = int(sys.argv[1]), sys.argv[2]
    with initialize(ParallelConfig(context=context, timeout_s=120)) as parallel:
        found = losses(engine(parallel, layers="te", precision=precision), 3)
        if parallel.is_main:
            print("LOSSES", *(f"{x:.6f}" for x in found))
