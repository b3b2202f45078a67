"""A judge for the tests of this folder that need an ordinary one."""

from collections.abc import Iterator

import pytest

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.judge import Judge


@pytest.fixture(scope="package")
def judge() -> Iterator[Judge]:
    """Two sandboxes, as isolated as this machine allows."""
    with Judge(JudgeConfig(workers=2), allow_unsafe=True) as judge:
        yield judge
