"""The files of the cache of answers: their names, their rows, and what keeps them few and small.

`pipelines.cache` says what they are for.
"""

import io
import logging
import posixpath
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from k2model.engine.request import Completion
from pipelines import storage
from pipelines.retries import retried
from schemas.errors import K2Error
from schemas.runs import SCHEMA_VERSION, Plan, digest

FOLDER = "_cache"

_MERGED_BYTES = 4_000_000
"""Of a merged file: some 100,000 rows of five labels. Smaller ones are too many, larger ones too much for one unit."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16)),
        pa.field("logprobs", pa.list_(pa.float64())),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("finish_reason", pa.string()),
    ]
)
_SUFFIX = ".parquet"
USED = ".used"
_MERGED = "merged"

# What a damaged file, or one out of reach, raises.
FAILURES = (K2Error, pa.ArrowException, OSError, ValueError)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the cache, as its folder is listed."""

    name: str
    size: int
    """Bytes."""
    written: float
    """Seconds since 1970, by the store's clock."""


def folder_of(output: str) -> str:
    """Return the cache's folder below the output folder of a job."""
    return storage.join(storage.absolute(output), FOLDER)


def listing(folder: str) -> list[Stored]:
    """Return the files of the cache by name; none if there is no such folder. Raises: StorageError."""
    fs, path = storage.filesystem(folder)

    def look() -> list[dict[str, Any]]:
        fs.invalidate_cache()
        return [entry for entry in fs.ls(path, detail=True) if entry["type"] == "file"]

    try:
        entries = retried(f"list {folder}", look)
    except FileNotFoundError:
        return []
    found = [Stored(posixpath.basename(entry["name"]), entry["size"] or 0, time_of(entry)) for entry in entries]
    return sorted(found, key=lambda stored: stored.name)


def time_of(entry: Mapping[str, Any]) -> float:
    """Return when a file was written, in seconds since 1970, as its store says; 0 if it does not."""
    value = next((entry[key] for key in storage.TIMES if entry.get(key)), 0.0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


def written(url: str) -> float | None:
    """Return when the file was written, as `time_of` tells; None if it is not there. Raises: StorageError."""
    fs, path = storage.filesystem(url)

    def look() -> float:
        fs.invalidate_cache(path)
        return time_of(fs.info(path))

    try:
        return retried(f"look at {url}", look)
    except FileNotFoundError:
        return None


def model_of(plan: Plan) -> str:
    """Return the name of all that decides an answer, but the requests."""
    return digest([SCHEMA_VERSION, plan.model_fingerprint, plan.mode])


def new_name(plan: Plan, unit_id: str) -> str:
    """Return a name that no file had yet."""
    return ".".join((model_of(plan), plan.run_id, unit_id, uuid.uuid4().hex)) + _SUFFIX


def parts(name: str) -> tuple[str, str, str]:
    """Return model, run and unit of the file `name`, all empty for a file that holds no answers."""
    model, _, rest = name.removesuffix(_SUFFIX).partition(".")
    run_id, _, unit_id = rest.rpartition(".")[0].rpartition(".")  # a run's id may have dots in it
    return (model, run_id, unit_id) if name.endswith(_SUFFIX) and model else ("", "", "")


def to_table(answers: Mapping[str, Sequence[Completion]]) -> pa.Table:
    """Return the rows of a file, sorted by key."""
    ordered = sorted(answers.items())
    completions = [completion for _, group in ordered for completion in group]
    keys = b"".join(bytes.fromhex(name) * len(group) for name, group in ordered)
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(completions), [None, pa.py_buffer(keys)]),
        _list_array([completion.logprobs for completion in completions], pa.float64()),
        _list_array([completion.token_ids for completion in completions], pa.int32()),
        pa.array([completion.finish_reason for completion in completions], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _list_array(rows: Sequence[Sequence[float]], type_: pa.DataType) -> pa.ListArray:
    offsets = pa.array([0, *accumulate(map(len, rows))], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(list(chain.from_iterable(rows)), type_))


def to_parquet(table: pa.Table) -> bytes:
    """Return `table` as a Parquet file of one row group whose pages carry checksums."""
    buffer = io.BytesIO()
    # Dictionaries of log-probabilities and keys, which hardly repeat, would take 25 % more space and 20 times the time.
    pq.write_table(
        table,
        buffer,
        row_group_size=max(table.num_rows, 1),
        compression="zstd",
        use_dictionary=["finish_reason"],
        write_page_checksum=True,
    )
    return buffer.getvalue()


def tidy(plan: Plan, max_gb: float) -> None:
    """Put the files of the run's units together, then prune the cache; not while its units are being annotated.

    A cache that cannot be tidied is left as it is, with a remark.
    """
    folder = storage.join(posixpath.dirname(plan.output), FOLDER)
    try:
        _merge(folder, plan)
        prune(folder, max_gb)
    except FAILURES as error:
        _LOG.warning("the cache is not tidied: %s: %s", folder, error)


def _merge(folder: str, plan: Plan) -> None:
    """Put files of single units together. A merged file is whole before the first of its sources is deleted."""
    own = (model_of(plan), plan.run_id)
    found = [(stored, *parts(stored.name)) for stored in listing(folder)]
    sources = [stored for stored, model, run_id, unit_id in found if (model, run_id) == own and unit_id != _MERGED]
    if len(sources) < 2:
        return
    for group in _groups(sources):
        names = [stored.name for stored in group]
        contents = storage.in_threads(lambda name: _content(storage.join(folder, name)), names)
        tables = [table for table in contents if table is not None]
        if tables:
            # The sort is stable: the completions of one key stay in order.
            merged = to_parquet(pa.concat_tables(tables).sort_by("key"))
            storage.write_bytes_atomic(storage.join(folder, new_name(plan, _MERGED)), merged)
        storage.in_threads(storage.delete, [storage.join(folder, name) for name in names])


def _groups(files: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Yield neighbours that are some `_MERGED_BYTES` together."""
    group: list[Stored] = []
    for stored in files:
        group.append(stored)
        if sum(one.size for one in group) >= _MERGED_BYTES:
            yield group
            group = []
    if group:
        yield group


def _content(url: str) -> pa.Table | None:
    """Return the rows of a file; None if it is damaged or gone."""
    try:
        table = pq.ParquetFile(io.BytesIO(storage.read_bytes(url)), page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError):  # what the store refuses is a StorageError
        return None
    return table if table.schema.equals(SCHEMA) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is in the cache."""

    files: int
    bytes: int
    models: int
    deleted_files: int
    """By this call."""
    deleted_bytes: int


def prune(folder: str, max_gb: float) -> Kept:
    """Delete the files that were not used for longest until those left hold at most `max_gb` (10^9 bytes).

    A file was used when it was written, or an answer was last taken from it. Runs under way compute what they miss.

    Raises: StorageError.
    """
    files = listing(folder)
    names = {stored.name for stored in files}
    orphans = {name for name in names if name.endswith(USED) and name.removesuffix(USED) not in names}
    used: dict[str, float] = {}
    for stored in files:
        name = stored.name.removesuffix(USED)
        used[name] = max(used.get(name, 0.0), stored.written)
    data = [stored for stored in files if not stored.name.endswith(USED)]
    data.sort(key=lambda stored: (-used[stored.name], stored.name))
    totals = accumulate(stored.size for stored in data)
    gone = [stored for stored, total in zip(data, totals, strict=True) if total > max_gb * 1e9]
    markers = {stored.name + USED for stored in gone} & names
    doomed = [*(stored.name for stored in gone), *markers, *orphans]
    storage.in_threads(storage.delete, [storage.join(folder, name) for name in doomed])
    kept = [stored for stored in data if stored not in set(gone)]
    return Kept(
        files=len(kept),
        bytes=sum(stored.size for stored in kept),
        models=len({model for stored in kept if (model := parts(stored.name)[0])}),
        deleted_files=len(gone),
        deleted_bytes=sum(stored.size for stored in gone),
    )
