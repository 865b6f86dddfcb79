"""What several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports triton: without a card its kernels run under its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a tiny checkpoint's folder; what is converted from it is kept in a cache of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2BATCH_CACHE", str(folder / "cache"))
        yield str(write_checkpoint(folder / "source"))
