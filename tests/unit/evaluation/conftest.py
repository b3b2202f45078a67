"""One process's groups for the tests of a module."""

import pytest

from ra3_megatron.parallel.groups import initialize, seed_everything


@pytest.fixture(scope="module")
def parallel():
    """A single-process `Parallel`, shut down after the module."""
    with initialize() as handle:
        seed_everything(0, handle)
        yield handle
