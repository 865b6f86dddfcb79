"""Files anywhere fsspec reaches: a path, `s3://`, `gs://`, `az://`, `memory://`. Calls are retried, then fail by name.

A URL is either a local absolute path or `<protocol>://...`; `absolute` makes one of anything a person may type. How a
store is reached (keys, roles, endpoints) is its client's matter and the environment's, never a URL's.

A write is whole or not there: object stores publish a PUT, or a multipart upload, when it is complete; on other stores
a temporary file is renamed. A read is whole or fails: a body cut short is an error that may pass.
"""

import errno
import io
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, BinaryIO, TypeVar, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from pipelines.retries import retried
from schemas.errors import EnvironmentMismatch, SpecError, StorageError
from schemas.urls import refuse_secrets, without_secrets

T = TypeVar("T")
R = TypeVar("R")

_LOCAL = LocalFileSystem()
_THREADS = 16
_PAGE = 4096
# A PUT is atomic there, and their clients compare a body with its Content-Length.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_ETAGS = ("ETag", "etag", "content_md5", "md5Hash")
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of `url`, and the path inside it.

    Raises: SpecError for an unknown protocol, or a URL with credentials; EnvironmentMismatch if its package is not
        installed.
    """
    if url.startswith("/") and "::" not in url:  # a sixth of the time that fsspec takes to find that out
        return _LOCAL, _LOCAL._strip_protocol(url)
    refuse_secrets(url)
    try:
        return cast(tuple[Any, str], url_to_fs(url))
    except ValueError as error:
        remedy = "use a path, or a URL such as s3://bucket/folder"
        raise SpecError(without_secrets(f"{url}: {error}"), remedy=remedy) from error
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f"pip install 'k2batch[{extra}]'" if extra else "install the fsspec package of this store"
        raise EnvironmentMismatch(f"{url}: {error}", remedy=remedy) from error


def absolute(url: str) -> str:
    """Return `url` without a trailing slash, and as an absolute path if it is local."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return path.rstrip("/") or "/"
    return cast(str, fs.unstrip_protocol(path)).rstrip("/")


def is_local(url: str) -> bool:
    """Return whether `url` is a path on this machine."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def _is_object_store(fs: Any) -> bool:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return not _OBJECT_STORES.isdisjoint(protocols)


def join(url: str, *names: str) -> str:
    """Return the URL of a name inside the folder `url`."""
    return posixpath.join(url, *names)


def find(pattern: str) -> list[str]:
    """Return the URLs of the files that `pattern` names: one file, a folder's `*.parquet`, or a glob; sorted.

    Raises: SpecError if there is none; StorageError, also if only one of the folders cannot be listed.
    """
    fs, path = filesystem(pattern)
    is_folder = pattern.endswith("/")
    kind = _kind(fs, path, pattern)
    # An existing file wins over a glob: brackets and stars are legal in names.
    if kind == "file" and not is_folder:
        found = [path]
    elif is_folder or not any(char in path for char in "*?["):
        # Listed, not globbed: the folder's own name may hold a star or a bracket.
        entries = _entries(fs, path.rstrip("/")) if kind == "directory" else []
        found = [name for name, kind in entries if kind == "file" and name.endswith(".parquet")]
    else:
        found = _glob(fs, path)
    if not found:
        raise SpecError(f"{pattern}: no input file matches", remedy="check [input] urls; a folder means its *.parquet")
    return sorted(absolute(cast(str, fs.unstrip_protocol(name))) for name in found)


def _kind(fs: Any, path: str, url: str) -> str:
    """Return `file`, `directory`, or nothing if there is neither. Not `fs.isfile`: to it a failing store has none."""
    try:
        return str(_info(fs, path, url)["type"])
    except FileNotFoundError:
        return ""


def _info(fs: Any, path: str, url: str) -> dict[str, Any]:
    """Return what the store knows of `path` now, not when its folder was last listed."""

    def look() -> dict[str, Any]:
        fs.invalidate_cache(path)
        return cast(dict[str, Any], fs.info(path))

    return retried(f"look at {url}", look)


def _entries(fs: Any, folder: str) -> list[tuple[str, str]]:
    """Return path and kind of all in `folder`; none if it is gone. A link to a folder is a `linked directory`."""

    def look() -> list[tuple[str, str]]:
        fs.invalidate_cache(folder)
        found = []
        for item in fs.ls(folder, detail=True):
            name, kind = item["name"].rstrip("/"), item["type"]
            if item.get("islink"):
                with suppress(FileNotFoundError):  # of a link that leads nowhere
                    kind = fs.info(name)["type"].replace("directory", "linked directory")
            if len(name) > len(folder):  # S3 lists a folder's own marker
                found.append((name, kind))
        return found

    try:
        return retried(f"list {folder}", look)
    except FileNotFoundError:
        return []


def _glob(fs: Any, path: str) -> list[str]:
    """Return the files that match. Not `fs.glob`, which leaves out a folder that cannot be listed, without a word."""
    parts = path.split("/")
    depth = next(index for index, part in enumerate(parts) if any(char in part for char in "*?["))
    folders = ["/".join(parts[:depth])]
    is_match = re.compile(glob_translate(path)).match
    found: list[str] = []
    while folders:
        depth += 1
        entries = [entry for entries in in_threads(lambda folder: _entries(fs, folder), folders) for entry in entries]
        found += [name for name, kind in entries if kind == "file" and is_match(name)]
        if "**" in parts[:depth]:  # links may lead in circles, and give a file many names
            folders = [name for name, kind in entries if kind == "directory"]
        else:
            is_way = re.compile(glob_translate("/".join(parts[:depth]))).match
            folders = [name for name, kind in entries if kind.endswith("directory") and is_way(name)]
            folders = folders if depth < len(parts) else []
    return found


def etag(url: str) -> str:
    """Return a text that changes with the file's content: the store's ETag, else size and time of change.

    Raises: FileNotFoundError; StorageError.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        stat = retried(f"look at {url}", lambda: os.stat(path))
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    info = _info(fs, path, url)
    for key in _ETAGS:
        if info.get(key):
            return str(info[key]).strip('"')
    changed = next((info[key] for key in TIMES if key in info), "")
    return f"{info.get('size')}-{changed}"


class _Ranges(io.RawIOBase):
    """A file of which each read is a request of its own: checked for length, tried again, no connection kept."""

    def __init__(self, fs: Any, path: str, url: str, size: int) -> None:
        self.fs = fs
        self.path = path
        self.url = url
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes, fewer at the end of the file, all that follow if it is None or negative."""
        start = min(self.position, self.size)
        end = self.size if size is None or size < 0 else min(start + size, self.size)
        content = retried(f"read {self.url}", lambda: self._fetch(start, end)) if end > start else b""
        self.position = end
        return content

    def _fetch(self, start: int, end: int) -> bytes:
        content = cast(bytes, self.fs.cat_file(self.path, start=start, end=end))
        return _whole(content, end - start)


def _whole(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise OSError(errno.EIO, f"{len(content)} bytes came, expected {size}")
    return content


def open_read(url: str) -> BinaryIO:
    """Return an open, seekable file; reads fetch only what is asked for. Not for more than one thread at a time.

    Raises: FileNotFoundError; StorageError, as do its reads.
    """
    fs, path = filesystem(url)
    size = _info(fs, path, url)["size"]
    if size is None:  # a web server may not tell
        return io.BytesIO(retried(f"read {url}", lambda: fs.cat_file(path)))
    return cast(BinaryIO, _Ranges(fs, path, url, size))


def read_tail(url: str, size: int) -> bytes:
    """Return the last `size` bytes, or all if there are fewer. Raises: FileNotFoundError; StorageError."""
    with open_read(url) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read()


def read_bytes(url: str) -> bytes:
    """Return the whole content. Raises: FileNotFoundError; StorageError."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return retried(f"read {url}", lambda: _read_local(path))
    if _is_object_store(fs):  # one request: to ask for the size would be a second
        return cast(bytes, retried(f"read {url}", lambda: fs.cat_file(path)))
    with open_read(url) as file:
        return file.read()


def _read_local(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def read_text(url: str) -> str:
    """Return the whole content as text. Raises: FileNotFoundError; StorageError."""
    return read_bytes(url).decode()


def write_bytes_atomic(url: str, data: bytes, *, is_durable: bool = True) -> None:
    """Write the file whole or not at all, over one that is there.

    Args:
        url: of the file.
        data: its content.
        is_durable: whether a local file must outlive a power cut, which takes 8 ms and not 0.1.

    Raises: StorageError.
    """
    fs, path = filesystem(url)

    def write() -> None:
        if isinstance(fs, LocalFileSystem):
            try:
                _write_local(path, lambda file: file.write(data), is_durable)
            except FileNotFoundError:  # a driver that tidies up a complete run took the temporary file of a late one
                _write_local(path, lambda file: file.write(data), is_durable)
        elif _is_object_store(fs) or type(fs).mv is AbstractFileSystem.mv:  # which copies
            fs.pipe_file(path, data)
        else:
            _write_and_rename(fs, path, data)

    try:
        retried(f"write {url}", write)
    except FileNotFoundError as error:
        text = without_secrets(f"cannot write {url}: no such bucket or folder: {error}")
        raise StorageError(text, remedy="create it, or mend [output] url") from error


def write_file_atomic(url: str, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file of any size, which is there whole afterwards or, if it raises, not at all.

    Raises: StorageError; what `write` raises.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        retried(f"write {url}", lambda: _write_local(path, write, is_durable=True))
        return
    with tempfile.TemporaryDirectory() as folder:
        whole = os.path.join(folder, posixpath.basename(path))
        _write_local(whole, write, is_durable=False)
        retried(f"write {url}", lambda: fs.put_file(whole, path))


def _write_local(path: str, write: Callable[[BinaryIO], object], is_durable: bool) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if not is_durable:
        return
    # The name too, or a power cut could leave a receipt and take the data it speaks of.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems sync no folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_and_rename(fs: Any, path: str, data: bytes) -> None:
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    temporary = _temporary(path)
    try:
        fs.pipe_file(temporary, data)
        fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(temporary)
        raise


def _temporary(path: str) -> str:
    """Return a name beside `path` that no listing takes for a data file or a receipt: a leading dot, no suffix."""
    folder, name = posixpath.split(path)
    return posixpath.join(folder, f".{name}.{uuid.uuid4().hex}")


def exists(url: str) -> bool:
    """Return whether the file exists now, not when its folder was last listed. Raises: StorageError."""
    fs, path = filesystem(url)
    return _kind(fs, path, url) != ""


def names(url: str) -> list[str]:
    """Return the names of the files in the folder `url`, sorted; empty if there is no folder. Raises: StorageError."""
    fs, path = filesystem(url)
    try:
        if isinstance(fs, LocalFileSystem):
            return sorted(retried(f"list {url}", lambda: _scan(path)))
        if hasattr(fs, "call_s3"):
            return sorted(name for page in _s3_pages(fs, path, url) for name in page)
    except FileNotFoundError:
        return []
    return sorted(posixpath.basename(name) for name, kind in _entries(fs, path) if kind == "file")


def folders(url: str) -> list[str]:
    """Return the names of the folders in the folder `url`, sorted; empty if there is none. Raises: StorageError."""
    fs, path = filesystem(url)
    return sorted(posixpath.basename(name) for name, kind in _entries(fs, path) if kind == "directory")


def _scan(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_file()]


def _s3_pages(fs: Any, path: str, url: str) -> Iterator[list[str]]:
    """Yield the names of each page of a listing, retried by the page.

    `fs.ls` keeps all that S3 says of each, also after it returns: 131 MB for 100,000 names, 34 MB here.
    """
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key}/" if key else ""
    asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    while True:
        page = retried(f"list {url}", lambda: fs.call_s3("list_objects_v2", **asked))
        keys = [item["Key"] for item in page.get("Contents", ())]
        yield [key.removeprefix(prefix) for key in keys if key != prefix]  # S3 lists a folder's own marker
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def delete(url: str) -> None:
    """Delete the file; one that is not there is as good as deleted. Raises: StorageError."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        retried(f"delete {url}", lambda: fs.rm_file(path))


def in_threads(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return `call` of every item, in order; waits on storage overlap."""
    rest = iter(items)
    found: list[R] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        # By pages: a future takes 1 kB, a million of them more than most of what they return.
        while page := list(islice(rest, _PAGE)):
            found.extend(pool.map(call, page))
    return found
