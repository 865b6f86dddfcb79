"""The sample shards: regenerated, they are the same; and they are as dirty as the flow must bear."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.samples import generate

FOLDER = Path(generate.__file__).parent
SHARDS = [(sample, shard) for sample in generate.SAMPLES for shard in range(len(sample.shards))]


@pytest.mark.parametrize(("sample", "shard"), SHARDS, ids=lambda value: getattr(value, "name", value))
def test_shard_is_what_its_generator_writes(sample: generate.Sample, shard: int) -> None:
    path = FOLDER / f"{sample.name}-{shard:05d}.parquet"
    made = generate.shard_table(sample, shard)
    # Compared as bytes: some bodies are no UTF-8 on purpose.
    assert _as_binary(pq.read_table(path)).equals(_as_binary(made))
    rows, row_group_size = sample.shards[shard]
    assert pq.ParquetFile(path).metadata.num_row_groups == -(-rows // row_group_size)


def test_samples_are_small_and_all_there() -> None:
    files = sorted(FOLDER.glob("*.parquet"))
    assert len(files) == len(SHARDS) + 1
    assert pq.read_table(FOLDER / "labelled.parquet").equals(generate.labelled_table())
    assert sum(path.stat().st_size for path in files) < 1_000_000


@pytest.mark.parametrize("sample", generate.SAMPLES, ids=lambda sample: sample.name)
def test_every_kind_of_dirt_is_present(sample: generate.Sample) -> None:
    tables = [generate.shard_table(sample, shard) for shard in range(len(sample.shards))]
    bodies = [value.as_buffer().to_pybytes() if value.is_valid else None for t in tables for value in t["body"]]
    texts = [body.decode(errors="surrogateescape") for body in bodies if body is not None]
    ids = [value for table in tables for value in table["ticket_id"].to_pylist()]
    found = {
        "null body": None in bodies,
        "blank": any(not text.strip() for text in texts),
        "zero-width only": any(text and not text.strip("\u200b\ufeff") for text in texts),
        "not UTF-8": any("\udc80" <= char <= "\udcff" for text in texts for char in text),
        "control character": any("\x00" in text or "\x1b" in text or "\x07" in text for text in texts),
        "special token": any("<|im_end|>" in text for text in texts),
        "30,000 characters": any(len(text) == 30_000 for text in texts),
        "400,000 characters": any(len(text) == 400_000 for text in texts),
        "repeated id": len(set(ids)) < len(ids),
        "null id": None in ids,
        "same text twice": len(set(texts)) < len(texts),
        "right to left": any("\u0600" <= char <= "\u06ff" for text in texts for char in text),
        "emoji": any("😀" in text for text in texts),
    }
    assert [kind for kind, is_found in found.items() if not is_found] == []


def _as_binary(table: pa.Table) -> pa.Table:
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            chunk = table.column(i).combine_chunks()
            chunk = chunk.combine_chunks() if isinstance(chunk, pa.ChunkedArray) else chunk
            table = table.set_column(i, field.name, chunk.view(pa.binary()))
    return table
