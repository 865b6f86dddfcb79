"""What the fake model says of the shipped samples, to the byte: files that differ would differ for every user."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.spec import load_spec
from pipelines.commit import read_receipts
from tests.fakes import annotate_directly, fake_plan

ROOT = Path(__file__).parents[1]

# By job file: digests of the data files, and of what is told of rejected rows, of the first units of a sample.
GOLDEN = {
    "moderation_sweep": ("ee161fb97b4add83", "b41560392370944e"),
    "labeling_run": ("8e1aeaaf1b9644be", "6b25537bb0323e3e"),
    "support_triage": ("2e1936746d1027aa", "f096f58944453cb7"),
    "support_fields": ("b4d4cc2bbed1c368", "1f344305de7be027"),
}


@pytest.mark.skipif(pa.__version__ != "25.0.1", reason="another pyarrow may write other bytes")
@pytest.mark.parametrize("name", GOLDEN)
def test_files_of_the_samples_are_what_they_were(name: str, tmp_path: Path) -> None:
    spec = load_spec(str(ROOT / "jobs" / "specs" / f"{name}.toml"), {})
    sample = ROOT / "jobs" / "samples" / f"{name.partition('_')[0]}-00002.parquet"
    plan = fake_plan([sample], tmp_path, columns=spec.columns, tasks=spec.tasks, unit_rows=60)
    annotate_directly(plan, plan.units[:3])
    receipts = sorted(read_receipts(plan).values(), key=lambda receipt: receipt.data_sha256)
    rejects = [
        row  # its unit and its URL depend on where the samples are
        for receipt in receipts
        if receipt.rejects
        for row in pq.read_table(Path(plan.output) / "rejects" / receipt.rejects).drop(["unit_id", "url"]).to_pylist()
    ]
    assert rejects
    assert (_digest([receipt.data_sha256 for receipt in receipts]), _digest(rejects)) == GOLDEN[name]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
