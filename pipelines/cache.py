"""Answers kept across runs: what the same model was asked before, under the same output, is not computed again.

`<output>/_cache/` holds Parquet files. Each is written once, whole, under a name that no other attempt has:

    <model>.<run_id>.<unit_id>.<attempt>.parquet   what one attempt at a unit computed
    <model>.<run_id>.merged.<attempt>.parquet      those of a run, put together at its end, some 4 MB in each
    <name>.used                                    empty; its time is when an answer was last taken from <name>

`<model>` stands for all that decides an answer but the requests: fingerprint, mode, `SCHEMA_VERSION`. A row is one
completion; `key`, the prompt hash, names the requests, and their completions stand together, in order. They are kept
as the engine gave them: what is applied behind it, thresholds and calibration, is not part of the key. Errors are not
kept.

Tickets keep their neighbours from one input to the next, so answers stay beside those of their unit, and a process
holds only an index: of each key 8 bytes, and the number of its file, 12 MB for a million rows. Beyond `MAX_KEYS` it
holds an even sample of the keys; a unit is looked up in every file that has one of its sampled keys, as backup stores
do (sparse indexing, Lillibridge et al., FAST 2009). What is missed then is a text repeated far from its neighbours.

No state of the cache is an error of a run: a file that is damaged, gone or out of reach is left out, with a remark.
A run never reads what it wrote itself, so that a kill changes nothing in its output, not even `route`.
"""

import io
import logging
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from k2model.engine.request import Completion
from pipelines import storage
from pipelines.cache_files import (
    FAILURES,
    FOLDER,
    SCHEMA,
    USED,
    listing,
    model_of,
    new_name,
    parts,
    to_parquet,
    to_table,
    written,
)
from schemas.runs import Plan

R = TypeVar("R")
_Numbers = npt.NDArray[np.uint64]

MAX_KEYS = 1 << 24
"""Keys in the index of one process, 200 MB; beyond, it is a sample."""

_DECODED_BYTES = 256_000_000
"""Files kept decoded in a process: some 3 million rows of five labels. Neighbouring units need the same ones."""

_LOG = logging.getLogger(__name__)


class _Answers:
    """One file, decoded. Its keys ascend; each is two numbers, `high` and `low`."""

    def __init__(self, content: bytes) -> None:
        """Decode `content`. Raises: ArrowException, OSError or ValueError if it is damaged."""
        table = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read()
        if not table.schema.equals(SCHEMA):
            raise ValueError("it has other columns")
        key, logprobs, token_ids, finish_reason = (column.combine_chunks() for column in table.columns)
        halves = _halves(key.buffers()[1])[key.offset : key.offset + len(key)]
        self.high, self.low = np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])
        self._logprobs, self._token_ids = _lists(logprobs), _lists(token_ids)
        reasons = finish_reason.dictionary_encode()
        self._reasons, self._reason = reasons.dictionary.to_pylist(), reasons.indices.to_numpy()
        arrays = (self.high, self.low, *self._logprobs, *self._token_ids, self._reason)
        self.nbytes = sum(array.nbytes for array in arrays)

    def find(self, keys: _Numbers, counts: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.intp], list[Completion]]:
        """Return which of `keys`, [N, 2], are here, ascending, and in this order their completions, `counts` each."""
        # Of two keys that begin with the same 64 bits, one is a miss, and that does no harm.
        first = np.searchsorted(self.high, keys[:, 0])
        last = first + counts - 1
        at = np.flatnonzero(last < len(self.high))
        for rows in (first, last):
            at = at[(self.high[rows[at]] == keys[at, 0]) & (self.low[rows[at]] == keys[at, 1])]
        rows = _ranges(first[at], counts[at])
        lists = zip(
            _items(self._logprobs, rows), _items(self._token_ids, rows), self._reason[rows].tolist(), strict=True
        )
        found = [
            Completion(logprobs=logprobs, token_ids=token_ids, finish_reason=self._reasons[reason])
            for logprobs, token_ids, reason in lists
        ]
        return at, found


def _halves(keys: Any) -> _Numbers:
    """Return the two numbers of each key of 16 bytes, [N, 2]; they sort as the bytes do."""
    return np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64)


def _lists(array: pa.ListArray) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return array.offsets.to_numpy(), array.values.to_numpy()


def _ranges(starts: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return start, start + 1, ... of each range, `counts` of it, one range behind the other."""
    before = np.cumsum(counts) - counts
    within: npt.NDArray[np.intp] = np.arange(int(counts.sum()), dtype=np.intp)
    within += np.repeat(starts - before, counts)
    return within


def _items(lists: tuple[npt.NDArray[Any], npt.NDArray[Any]], rows: npt.NDArray[np.intp]) -> list[tuple[Any, ...]]:
    """Return the lists at `rows`."""
    offsets, values = lists
    counts = offsets[rows + 1] - offsets[rows]
    if not counts.any():
        return [()] * len(rows)
    flat = values[_ranges(offsets[rows], counts)].tolist()
    stops = np.cumsum(counts).tolist()
    return [tuple(flat[stop - count : stop]) for stop, count in zip(stops, counts.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class _Index:
    """Where keys are: the first 64 bits of each, ascending, and the number of a file that has it."""

    high: _Numbers
    place: npt.NDArray[np.uint32]
    highest: int
    """Keys above are left out."""
    names: list[str]

    def files(self, high: _Numbers) -> list[str]:
        """Return the files that have any of these keys."""
        high = high[high <= np.uint64(self.highest)]
        at = np.searchsorted(self.high, high)
        is_in = at < len(self.high)
        at, high = at[is_in], high[is_in]
        return [self.names[number] for number in np.unique(self.place[at[self.high[at] == high]])]


def _make_index(names: Sequence[str], read: Callable[[str], _Numbers | None]) -> _Index:
    """Return the index of the files `names`, whose keys `read` returns, ascending."""
    highs: list[_Numbers] = []
    places: list[npt.NDArray[np.uint32]] = []
    highest = 2**64 - 1
    for start in range(0, len(names), 64):  # each is read whole, 4 MB or so; not all of them at once
        for number, high in enumerate(storage.in_threads(read, names[start : start + 64]), start=start):
            if high is not None and len(high):
                high = high[np.flatnonzero(np.r_[True, high[1:] != high[:-1]])]
                high = high[: np.searchsorted(high, np.uint64(highest), side="right")].copy()
                highs.append(high)
                places.append(np.full(len(high), number, np.uint32))
        while sum(map(len, highs)) > MAX_KEYS:
            highest //= 2
            ends = [np.searchsorted(high, np.uint64(highest), side="right") for high in highs]
            highs = [high[:end].copy() for high, end in zip(highs, ends, strict=True)]
            places = [place[:end].copy() for place, end in zip(places, ends, strict=True)]
    high = np.concatenate(highs) if highs else np.zeros(0, np.uint64)
    place = np.concatenate(places) if places else np.zeros(0, np.uint32)
    order = np.argsort(high, kind="stable")
    return _Index(high[order], place[order], highest, list(names))


class Cache:
    """The answers that one run may take, and a place for its own."""

    def __init__(self, plan: Plan) -> None:
        """Open the cache of the plan's output; nothing is read before the first look-up."""
        self._plan = plan
        self._folder = storage.join(posixpath.dirname(plan.output), FOLDER)
        self._model = model_of(plan)
        self._lock = threading.Lock()
        self._index: _Index | None = None
        self._decoded: OrderedDict[str, _Answers] = OrderedDict()
        self._used: set[str] = set()
        self._remarked: set[str] = set()

    def lookup(self, wanted: Mapping[str, int]) -> dict[str, list[Completion]]:
        """Return the completions of those of `wanted` that are known.

        Args:
            wanted: prompt hash (32 hex digits) to the number of its completions.
        """
        if not wanted:
            return {}
        names, counts = list(wanted), np.array(list(wanted.values()))
        keys = _halves(bytes.fromhex("".join(names)))
        found: dict[str, list[Completion]] = {}
        for file in self._open_index().files(keys[:, 0]):
            answers = self._file(file)
            if answers is None:
                continue
            at, completions = answers.find(keys, counts)
            start = 0
            for name in (names[number] for number in at.tolist()):
                found[name] = completions[start : start + wanted[name]]
                start += wanted[name]
        return found

    def store(self, unit_id: str, answers: Mapping[str, Sequence[Completion]]) -> None:
        """Keep these completions, by prompt hash, for runs to come."""
        if answers:
            name = new_name(self._plan, unit_id)
            content = to_parquet(to_table(answers))
            self._attempt(name, lambda: storage.write_bytes_atomic(storage.join(self._folder, name), content))

    def _open_index(self) -> _Index:
        with self._lock:
            if self._index is None:
                self._index = _make_index(self._attempt(FOLDER, self._names) or [], self._keys)
            return self._index

    def _names(self) -> list[str]:
        """Return the files of this model that the run may read: not its own, but those of an earlier run of its id."""
        found = [(stored, *parts(stored.name)) for stored in listing(self._folder)]
        found = [file for file in found if file[1] == self._model]
        is_own = any(run_id == self._plan.run_id for _, _, run_id, _ in found)
        started = (written(storage.join(self._plan.output, "plan.json")) or 0.0) if is_own else 0.0
        return [
            stored.name for stored, _, run_id, _ in found if run_id != self._plan.run_id or stored.written < started
        ]

    def _keys(self, name: str) -> _Numbers | None:
        answers = self._read(name)
        return None if answers is None else answers.high

    def _read(self, name: str) -> _Answers | None:
        return self._attempt(name, lambda: _Answers(storage.read_bytes(storage.join(self._folder, name))))

    def _file(self, name: str) -> _Answers | None:
        """Return a file of the index, decoded; None if it is damaged or gone, and then the files are listed anew."""
        with self._lock:
            answers = self._decoded.get(name)
            if answers is not None:
                self._decoded.move_to_end(name)
                return answers
            answers = self._read(name)
            if answers is None:
                self._index = None
                return None
            self._decoded[name] = answers
            while len(self._decoded) > 1 and sum(a.nbytes for a in self._decoded.values()) > _DECODED_BYTES:
                self._decoded.popitem(last=False)
            if name not in self._used:
                self._used.add(name)
                marker = name + USED
                self._attempt(marker, lambda: storage.write_bytes_atomic(storage.join(self._folder, marker), b""))
            return answers

    def _attempt(self, name: str, call: Callable[[], R]) -> R | None:
        """Return `call()`, or None with a remark, once for each name, if the store or the file is at fault."""
        try:
            return call()
        except FAILURES as error:
            if name not in self._remarked:
                self._remarked.add(name)
                _LOG.warning("cached answers left out: %s: %s", storage.join(self._folder, name), error)
            return None


_OPEN: dict[str, Cache] = {}
_OPEN_LOCK = threading.Lock()


def open_cache(plan: Plan) -> Cache | None:
    """Return this process's cache for the run; None if the job wants none."""
    if not plan.uses_cache:
        return None
    with _OPEN_LOCK:
        cache = _OPEN.get(plan.output)
        if cache is None:
            cache = _OPEN[plan.output] = Cache(plan)
        return cache


def close_caches() -> None:
    """Let go of what this process holds in memory; the next `open_cache` lists the files again."""
    with _OPEN_LOCK:
        _OPEN.clear()
