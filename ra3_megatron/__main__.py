"""`python -m ra3_megatron` is the command `ra3`, for launchers that take a module."""

import sys

if sys.version_info < (3, 12):  # noqa: UP036  whoever starts it by path may have any Python
    # Before anything is imported: an older Python stops at the first newer piece of syntax and says nothing useful.
    found = f"{sys.executable} is {sys.version.split()[0]}"
    sys.exit(f"error: ra3 needs Python 3.12 or newer; {found}; start another (RA3_HOST_PYTHON for slurm/*.sh)")

from ra3_megatron.cli import main

if __name__ == "__main__":
    # The guard matters: checkpoint writers spawn processes that import this module again.
    main()
