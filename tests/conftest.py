"""What several test files share."""

from collections.abc import Iterator

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a tiny checkpoint's folder; what is converted from it is kept in a cache of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2BATCH_CACHE", str(folder / "cache"))
        yield str(write_checkpoint(folder / "source"))
