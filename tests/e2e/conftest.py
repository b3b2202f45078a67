"""One fork server for the whole folder: see `tests.e2e.forked`."""

from collections.abc import Iterator

import pytest

from tests.e2e.forked import ForkServer
from tests.e2e.small import write_config


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("forked")) as server:
        yield server


@pytest.fixture(scope="session")
def base(tmp_path_factory, server):
    """Folder of a finished run of two steps; its export is a Hugging Face model with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    (done,) = server.cli(["midtrain", str(write_config(folder, train={"steps": 3, "eval_interval": 0}))])
    assert done.code == 0, done.err[-3000:]
    return folder
