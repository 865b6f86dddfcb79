"""Storage: what is retried, what is not, and what an interrupted write leaves."""

import os
from pathlib import Path

import pytest
from tenacity import wait_none

from pipelines import storage
from schemas.errors import StorageError


class Flaky:
    """Fails some times, then answers."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error = error
        self.failures = failures
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return "answer"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WAIT", wait_none())


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError("slow"), ConnectionError("gone")])
def test_passing_errors_are_retried(error: Exception) -> None:
    flaky = Flaky(error, failures=3)
    assert storage.retried("read it", flaky) == "answer"
    assert flaky.calls == 4


def test_lasting_errors_become_a_storage_error() -> None:
    flaky = Flaky(OSError("reset"), failures=99)
    with pytest.raises(StorageError, match="cannot read it: OSError: reset"):
        storage.retried("read it", flaky)
    assert flaky.calls == 4


def test_missing_file_is_not_retried() -> None:
    flaky = Flaky(FileNotFoundError("no"), failures=1)
    with pytest.raises(FileNotFoundError):
        storage.retried("read it", flaky)
    assert flaky.calls == 1


def test_refused_access_is_not_retried() -> None:
    flaky = Flaky(PermissionError("no"), failures=1)
    with pytest.raises(StorageError, match="PermissionError"):
        storage.retried("read it", flaky)
    assert flaky.calls == 1


def test_our_own_mistakes_pass_through() -> None:
    flaky = Flaky(ValueError("bug"), failures=1)
    with pytest.raises(ValueError, match="bug"):
        storage.retried("read it", flaky)
    assert flaky.calls == 1


@pytest.mark.parametrize("folder", ["local", "memory"])
def test_write_read_list_delete(folder: str, tmp_path: Path) -> None:
    url = str(tmp_path / "deep" / "er") if folder == "local" else "memory://deep/er"
    file = storage.join(url, "a.json")
    assert storage.names(url) == []
    assert not storage.exists(file)
    storage.write_bytes_atomic(file, b"1")
    storage.write_bytes_atomic(file, b"22")
    assert storage.read_text(file) == "22"
    assert storage.read_tail(file, 1) == b"2"
    assert storage.names(url) == ["a.json"]
    storage.delete(file)
    storage.delete(file)
    assert storage.names(url) == []


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    storage.write_bytes_atomic(str(path), b"old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="disk full"):
        storage.write_bytes_atomic(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_etag_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    os.utime(path, ns=(1_700_000_000_000_000_001, 1_700_000_000_000_000_001))
    first = storage.etag(str(path))
    os.utime(path, ns=(1_700_000_000_000_000_002, 1_700_000_000_000_000_002))
    assert storage.etag(str(path)) != first
    with pytest.raises(FileNotFoundError):
        storage.etag(str(tmp_path / "none"))
