"""The measurements run, on a tiny checkpoint, and say what they say they do."""

from pathlib import Path

import pytest

from jobs import bench
from k2model.engine.engine import load
from tests.fake_jobs import peers_files


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, str]:
    """Return the two files of the peers' work, small."""
    return peers_files(tmp_path)


def test_linear_times_every_layer_at_every_size(checkpoint: str) -> None:
    rows = bench.linear(checkpoint, rounds=2)["rows"]
    assert {row["layer"] for row in rows} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {row["tokens"] for row in rows} == {1, 8, 32, 128, 512, 1024}
    assert all(row["int8_us"] > 0 and row["bfloat16_us"] > 0 for row in rows)


def test_quality_is_zero_against_itself_and_small_for_int8(
    checkpoint: str, prompts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (prompts["tickets"], prompts["labels"])
    measured = bench.quality(checkpoint, *files)
    assert 0 < measured["kl_vocabulary"] < 0.1
    exact = load(checkpoint, "fp32")
    monkeypatch.setattr(bench, "load", lambda *_: exact)
    assert bench.quality(checkpoint, *files)["kl_labels"] == 0
