"""A folder that appears under its name when it is whole: what is there can be trusted after a crash."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import CheckpointError


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes it when the context is left without an error.

    Raises: CheckpointError if `target` holds anything already.
    """
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty", remedy="give an empty folder, or one that is not there")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an attempt that was killed
    part.mkdir(parents=True)
    yield part
    part.rename(target)  # over an empty folder too
