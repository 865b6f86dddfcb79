"""A store that fails: `faulty:///folder` keeps files in a local folder, and lets a share of all calls go wrong.

Which calls fail, and how, follows from the seed, the call and how often it was made, not from time or threads.

- any call: throttled (503), connection reset, timed out, slow;
- a read: cut short, without an error;
- a write: half of it left under another name, or all of it written and the answer lost;
- a delete: done and the answer lost.

It is told what to do by the environment, at each call, so that worker processes fail too:

- `K2_FAULT_RATE`: the share of calls; `K2_FAULT_SEED`;
- `K2_STALE_RATE`: the share of listings that are those of before;
- `K2_FAULT_LOG`: a file that gets a line for each call; while one beside it, ending in `.down`, exists, all calls fail;
- `K2_FAULT_WAIT_S`: the longest wait before a call is tried again, when this module is imported.

    python -m tests.faulty_store        prints what failures cost a run, for BENCHMARKS.md
"""

import errno
import hashlib
import os
import re
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines import retries
from pipelines.commit import pending_units, read_receipts, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.runs import Plan
from tests.fakes import fake_plan, open_fake_engine, tickets, write_tickets

_SLOW_S = 0.02
_OUTAGE = "all, for 60 s"


if longest := os.environ.get("K2_FAULT_WAIT_S"):
    retries.MAX_WAIT_S = float(longest)
    retries.FIRST_WAIT_S = float(longest) / 4


class _Memory:
    """What this process asked of the store before."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Counter[tuple[str, str]] = Counter()
        self.listings: dict[str, list[dict[str, Any]]] = {}


_MEMORY = _Memory()


def asked() -> tuple[Counter[str], Counter[str]]:
    """Return the calls of all processes by kind, and what went wrong by kind."""
    lines = [line.split("\t") for line in Path(os.environ["K2_FAULT_LOG"]).read_text().splitlines()]
    return Counter(call for call, _ in lines), Counter(fault for _, fault in lines if fault)


def _log(call: str, fault: str) -> None:
    if log := os.environ.get("K2_FAULT_LOG"):
        with open(log, "a") as file:
            file.write(f"{call}\t{fault}\n")


def _is_down() -> bool:
    return os.path.exists(os.environ.get("K2_FAULT_LOG", "") + ".down")


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Files of a local folder, behind a bad connection."""

    protocol = "faulty"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.disk = LocalFileSystem()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("faulty://").rstrip("/")

    def _fault(self, call: str, path: str, special: tuple[str, ...]) -> str:
        """Count the call; raise, or return how it goes wrong, or nothing."""
        with _MEMORY.lock:
            _MEMORY.made[call, path] += 1
            number = _MEMORY.made[call, path]
        rate = float(os.environ.get("K2_FAULT_RATE", "0"))
        # Without the folder, which is another in each test, and the attempt: the same calls fail each time.
        file = re.sub(r"-[0-9a-f]{8,}(?=\.)", "", Path(path).name)
        name = "|".join((os.environ.get("K2_FAULT_SEED", "0"), call, file, str(number)))
        digest = hashlib.sha256(name.encode()).digest()
        kinds: tuple[str, ...] = ("throttled", "reset", "timed out")
        if not _is_down():
            if int.from_bytes(digest[:4], "little") / 2**32 >= rate:
                _log(call, "")
                return ""
            kinds = (*kinds, "slow", *special)
        kind = kinds[digest[4] % len(kinds)]
        _log(call, kind)
        if kind == "throttled":
            raise OSError(errno.EBUSY, "SlowDown: Please reduce your request rate.")
        if kind == "reset":
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if kind == "timed out":
            raise TimeoutError("Read timeout")
        if kind == "slow":
            time.sleep(_SLOW_S)
            return ""
        return kind

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._fault("info", path, ())
        return dict(self.disk.info(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        self._fault("ls", path, ())
        try:
            found = self.disk.ls(path, detail=True)
        except FileNotFoundError:
            _MEMORY.listings[path] = []
            raise
        with _MEMORY.lock:
            number = _MEMORY.made["ls", path]
            before = _MEMORY.listings.get(path)
            _MEMORY.listings[path] = found
        chance = hashlib.sha256(f"stale|{Path(path).name}|{number}".encode()).digest()[0] / 256
        if before is not None and chance < float(os.environ.get("K2_STALE_RATE", "0")):
            _log("ls", "stale")
            found = before
        return found if detail else [item["name"] for item in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        fault = self._fault("cat", path, ("cut short",))
        content = bytes(self.disk.cat_file(path, start=start, end=end))
        return content[: len(content) // 2] if fault else content

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        fault = self._fault("pipe", path, ("half", "answer lost"))
        self.disk.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f".upload-{uuid.uuid4().hex}")
        with open(temporary, "wb") as file:
            file.write(value[: len(value) // 2] if fault == "half" else value)
        if fault == "half":
            raise ConnectionAbortedError(errno.ECONNABORTED, "connection lost during the upload")
        os.replace(temporary, path)
        if fault:
            raise TimeoutError("no answer to the upload")

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        fault = self._fault("rm", path, ("answer lost",))
        os.unlink(path)
        if fault:
            raise TimeoutError("no answer to the delete")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        raise NotImplementedError("k2batch reads by range and writes whole")


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def open_engine(plan: Plan) -> Any:
    """Open the fake model in a process that may not know this store yet."""
    return open_fake_engine(plan)


def annotate(folder: Path, name: str, num_units: int) -> Plan:
    """Return the plan of a run, complete, of 20 rows a unit; its files are in `folder/name`."""
    source = folder / "in"
    if not source.exists():
        for number in range(0, num_units, 10):
            table = tickets(20 * min(10, num_units - number), start=20 * number)
            write_tickets(source, f"{number:05}.parquet", table, row_group_size=20)
    plan = fake_plan([f"faulty://{source}/*.parquet"], f"faulty://{folder}/{name}", unit_rows=20)
    write_plan(plan)
    run_units(plan, pending_units(plan), open_engine=open_engine)
    return plan


def content_of(plan: Plan) -> dict[str, str]:
    """Return the SHA-256 of the data of each unit that has a receipt."""
    return {unit_id: receipt.data_sha256 for unit_id, receipt in read_receipts(plan).items()}


def main() -> None:
    """Print the table of fault rates."""
    num_units = 100
    expected: dict[str, str] = {}
    print("| calls that fail | wall, s | calls | failed or slow | rows of 2,000 lost | same bytes |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for shown, rate in (("0 %", 0.0), ("5 %", 0.05), ("10 %", 0.1), ("30 %", 0.3), ("50 %", 0.5), (_OUTAGE, 0.0)):
            log = folder / f"log-{shown[:4]}"
            os.environ |= {"K2_FAULT_LOG": str(log), "K2_FAULT_RATE": str(rate)}
            if shown == _OUTAGE:
                threading.Timer(4.0, Path(f"{log}.down").touch).start()
                threading.Timer(64.0, lambda log=log: Path(f"{log}.down").unlink()).start()
            start = time.perf_counter()
            plan = annotate(folder, f"at-{shown[:4].strip()}", num_units)
            manifest = finalize(plan, max_reject_rate=0.0)
            seconds = time.perf_counter() - start
            calls, faults = (found.total() for found in asked())
            os.environ["K2_FAULT_RATE"] = "0"
            content = content_of(plan)
            expected = expected or content
            same = "yes" if content == expected and len(content) == num_units else "no"
            lost = plan.rows - manifest.rows_annotated
            print(f"| {shown} | {seconds:.1f} | {calls:,} | {faults:,} | {lost} | {same} |", flush=True)


if __name__ == "__main__":
    from tests import faulty_store

    faulty_store.main()  # not this copy of the module, which workers could not import
