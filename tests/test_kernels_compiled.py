"""Compiled loops: what is kept of one on disk is never another, and threads change no bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from kernels import compiled
from kernels.compiled import both, digest_of, run


def doubled(x: Any, out: Any) -> None:
    for i in numba.prange(x.size):
        out[i] = x[i] * 2


def test_both_ways_of_a_loop_are_kept_under_their_own_names() -> None:
    """Numba finds them by name alone, and took the one that is shared out for the one that is not."""
    digest = digest_of(Path(compiled.__file__).parent)
    names = [loop.py_func.__qualname__ for loop in both(doubled)]  # type: ignore[attr-defined]
    assert names == [f"doubled_alone_{digest}", f"doubled_shared_{digest}"]


def test_a_loop_is_not_found_again_once_a_file_changed_that_parts_of_it_come_from(tmp_path: Path) -> None:
    """Numba looks at the time of the loop's own file, and went on with the tiles that another one held before."""
    digests = set()
    for tiles, constants in (("import numba", ""), ("import numba", "A = 1"), ("import numba  # 2", "A = 1")):
        (tmp_path / "tiles.py").write_text(tiles)
        (tmp_path / "constants.py").write_text(constants)
        digests.add(digest_of.__wrapped__(tmp_path))
    assert len(digests) == 3


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_loop_is_the_same_with_openmp_and_without(is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_shared:
        monkeypatch.setattr(compiled, "_threads", lambda: 0)
    x, out = np.arange(100_000, dtype=np.float32), np.full(100_000, np.nan, np.float32)
    run(both(doubled), x.size, x, out)
    assert np.array_equal(out, x * 2)


_FIRST_LOOP = """
import torch
from kernels import rowwise
torch.set_num_threads(1)
rowwise.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
print(torch.get_num_threads())
"""


def test_numbas_first_loop_changes_no_number_of_torchs_threads() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", _FIRST_LOOP], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "1"
