"""Storage: whole writes, whole reads, whole listings, and URLs."""

import os
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import retries, storage
from schemas.errors import EnvironmentMismatch, SpecError, StorageError


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.002)
    monkeypatch.setattr(retries, "BUDGET_S", 0.1)


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


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "day=1").mkdir(parents=True)
    (tmp_path / "real" / "day=1" / "a.parquet").write_bytes(b"a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked.parquet").symlink_to(tmp_path / "real" / "day=1" / "a.parquet")
    (tmp_path / "in" / "nowhere.parquet").symlink_to(tmp_path / "none")
    (tmp_path / "in" / "day=2").symlink_to(tmp_path / "real" / "day=1")
    assert storage.find(f"{tmp_path}/in/") == [f"{tmp_path}/in/linked.parquet"]
    assert storage.find(f"{tmp_path}/in/*.parquet") == [f"{tmp_path}/in/linked.parquet"]
    assert storage.find(f"{tmp_path}/in/day=*/*.parquet") == [f"{tmp_path}/in/day=2/a.parquet"]
    assert storage.names(str(tmp_path / "in")) == ["linked.parquet"]


def test_globs(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.txt", "y=1/c.parquet", "y=1/m=2/d.parquet", "y=2/m=2/e[1].parquet"):
        storage.write_bytes_atomic(f"{tmp_path}/{name}", b"")
    (tmp_path / "y=1" / "circle").symlink_to(tmp_path)
    (tmp_path / "circle").symlink_to(tmp_path)

    def found(pattern: str) -> str:
        return "".join(url.rpartition("/")[2][0] for url in storage.find(f"{tmp_path}/{pattern}"))

    assert found("*.parquet") == "a"
    assert found("?.*") == "ab"
    assert found("y=*/*.parquet") == "c"
    assert found("y=*/circle/*.txt") == "b"
    assert found("y=*/m=2/*") == "de"
    assert found("**/*.parquet") == "acde"
    assert found("y=[!1]/**/*.parquet") == "e"
    assert found("y=2/m=2/e[1].parquet") == "e"
    with pytest.raises(SpecError, match="no input file matches"):
        found("z=*/*.parquet")


def test_a_glob_lists_only_folders_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("y=1/m=1/a", "y=1/m=1/deep/b", "y=1/other/c", "z=1/m=1/d"):
        storage.write_bytes_atomic(f"{tmp_path}/{name}", b"")
    listed: list[str] = []
    entries = storage._entries

    def note(fs: object, folder: str) -> list[tuple[str, str]]:
        listed.append(folder.removeprefix(str(tmp_path)))
        return entries(fs, folder)

    monkeypatch.setattr(storage, "_entries", note)
    assert storage.find(f"{tmp_path}/y=*/m=*/*") == [f"{tmp_path}/y=1/m=1/a"]
    assert listed == ["", "/y=1", "/y=1/m=1"]


def test_reads_are_of_the_range_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with storage.open_read(str(tmp_path / "a")) as file:
        assert [file.seekable(), file.seek(0, os.SEEK_END)] == [True, 100]
        assert file.seek(-10, os.SEEK_CUR) == 90
        assert [file.read(4), file.tell(), file.read(), file.read(1)] == [b"Z[\\]", 94, bytes(range(94, 100)), b""]
        (tmp_path / "a").write_bytes(b"short")
        file.seek(0)
        with pytest.raises(StorageError, match="5 bytes came, expected 50"):
            file.read(50)
    assert storage.read_tail(str(tmp_path / "a"), 9) == b"short"


class RenamingStore(MemoryFileSystem):  # type: ignore[misc]
    """A store that shows a file while it is written, and renames: SFTP, HDFS."""

    protocol = "renaming"
    is_failing = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("renaming://")) if path else ""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        super().pipe_file(path, value[:2] if self.is_failing else value)
        if self.is_failing:
            raise ConnectionResetError("reset")

    def mv(self, path1: str, path2: str, **kwargs: object) -> None:
        self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))


def test_a_store_without_atomic_puts_gets_a_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("renaming", RenamingStore, clobber=True)
    url = "renaming:///out/receipts/a.json"
    storage.write_bytes_atomic(url, b"first")
    monkeypatch.setattr(RenamingStore, "is_failing", True)
    with pytest.raises(StorageError, match="ConnectionResetError"):
        storage.write_bytes_atomic(url, b"second")
    assert storage.names("renaming:///out/receipts") == ["a.json"]
    assert storage.read_bytes(url) == b"first"


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/a", "s3fs", "s3"), ("gs://b/a", "gcsfs", "gcs"), ("az://c/a", "adlfs", "azure")],
)
def test_a_missing_package_is_named_with_its_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = sys.modules["fsspec.registry"]._registry  # fsspec.registry is a view of it
    monkeypatch.delitem(opened, url.partition(":")[0], raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentMismatch, match=f"(?i){package}") as caught:
        storage.find(url)
    assert caught.value.remedy == f"pip install 'k2batch[{extra}]'"


def test_a_failing_store_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("slow")

    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    for ask in (storage.exists, storage.find, storage.open_read):
        with pytest.raises(StorageError, match="slow"):
            ask("memory://in/a.parquet")
