"""Files anywhere fsspec reaches: a path, `s3://`, `gs://`, `memory://`. Storage calls are retried, then fail by name.

A URL is either a local absolute path or `<protocol>://...`; `absolute` makes one of anything a person may type.
"""

import os
import posixpath
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from schemas.errors import EnvironmentMismatch, SpecError, StorageError

T = TypeVar("T")
R = TypeVar("R")

_ATTEMPTS = 4
_WAIT = wait_exponential(multiplier=0.5, max=8)
_THREADS = 16
# The same answer would come again: a retry only hides it for some seconds.
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)
# Network errors of these packages are not OSError.
_NETWORK_PACKAGES = frozenset({"aiobotocore", "aiohttp", "botocore"})
_ETAGS = ("ETag", "etag", "content_md5", "md5Hash")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of `url`, and the path inside it.

    Raises: SpecError for an unknown protocol; EnvironmentMismatch if its package is not installed.
    """
    try:
        return cast(tuple[Any, str], url_to_fs(url))
    except ValueError as error:
        raise SpecError(f"{url}: {error}", remedy="use a path, or a URL such as s3://bucket/folder") from error
    except ImportError as error:
        raise EnvironmentMismatch(f"{url}: {error}", remedy="install the fsspec package of this store") from error


def absolute(url: str) -> str:
    """Return `url` without a trailing slash, and as an absolute path if it is local."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return path.rstrip("/") or "/"
    return cast(str, fs.unstrip_protocol(path)).rstrip("/")


def is_local(url: str) -> bool:
    """Return whether `url` is a path on this machine."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def join(url: str, *names: str) -> str:
    """Return the URL of a name inside the folder `url`."""
    return posixpath.join(url, *names)


def retried(what: str, call: Callable[[], R]) -> R:
    """Return `call()`, tried again on errors that may pass.

    Raises: StorageError, once the attempts are used up; FileNotFoundError at once.
    """
    try:
        return Retrying(
            stop=stop_after_attempt(_ATTEMPTS), wait=_WAIT, retry=retry_if_exception(_may_pass), reraise=True
        )(call)
    except FileNotFoundError:
        raise
    except Exception as error:
        if not _is_storage_error(error):
            raise
        remedy = "check the store, its credentials and the free space; then run the same job again: it resumes"
        raise StorageError(f"cannot {what}: {type(error).__name__}: {error}", remedy=remedy) from error


def _is_storage_error(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, _FINAL) or type(error).__name__ == "NoCredentialsError":
        return False
    return _is_storage_error(error)


def find(pattern: str) -> list[str]:
    """Return the URLs of the files that `pattern` names: one file, a folder's `*.parquet`, or a glob; sorted.

    Raises: SpecError if there is none.
    """
    fs, path = filesystem(pattern)
    is_folder = pattern.endswith("/")

    def look() -> list[str]:
        fs.invalidate_cache()
        # An existing file wins over a glob: brackets and stars are legal in names.
        if not is_folder and fs.isfile(path):
            return [path]
        if is_folder or not _is_glob(path):
            folder = path.rstrip("/")
            # Listed, not globbed: the folder's own name may hold a star or a bracket.
            entries = fs.ls(folder, detail=True) if fs.isdir(folder) else []
            return [item["name"] for item in entries if item["type"] == "file" and item["name"].endswith(".parquet")]
        found = fs.glob(path, detail=True)
        return [name for name, item in found.items() if item["type"] == "file"]

    try:
        names = retried(f"list {pattern}", look)
    except FileNotFoundError:
        names = []
    if not names:
        raise SpecError(f"{pattern}: no input file matches", remedy="check [input] urls; a folder means its *.parquet")
    return sorted(absolute(cast(str, fs.unstrip_protocol(name))) for name in names)


def _is_glob(path: str) -> bool:
    return any(char in path for char in "*?[")


def etag(url: str) -> str:
    """Return a text that changes with the file's content: the store's ETag, else size and time of change.

    Raises: FileNotFoundError; StorageError.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        stat = retried(f"look at {url}", lambda: os.stat(path))
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def look() -> dict[str, Any]:
        fs.invalidate_cache(path)
        return cast(dict[str, Any], fs.info(path))

    info = retried(f"look at {url}", look)
    for key in _ETAGS:
        if info.get(key):
            return str(info[key]).strip('"')
    changed = next((info[key] for key in _TIMES if key in info), "")
    return f"{info.get('size')}-{changed}"


def open_read(url: str) -> BinaryIO:
    """Return an open, seekable file; reads fetch only what is asked for."""
    return cast(BinaryIO, retried(f"open {url}", lambda: fsspec.open(url, "rb").open()))


def read_tail(url: str, size: int) -> bytes:
    """Return the last `size` bytes, or all if there are fewer."""
    fs, path = filesystem(url)
    return cast(bytes, retried(f"read {url}", lambda: fs.tail(path, size)))


def read_bytes(url: str) -> bytes:
    """Return the whole content. Raises: FileNotFoundError; StorageError."""
    fs, path = filesystem(url)
    return cast(bytes, retried(f"read {url}", lambda: fs.cat_file(path)))


def read_text(url: str) -> str:
    """Return the whole content as text. Raises: FileNotFoundError; StorageError."""
    return read_bytes(url).decode()


def write_bytes_atomic(url: str, data: bytes) -> None:
    """Write the file whole or not at all: one PUT; locally a synced temporary file, then a rename."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        retried(f"write {url}", lambda: _write_local(path, data))
    else:
        retried(f"write {url}", lambda: fs.pipe_file(path, data))


def _write_local(path: str, data: bytes) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # The leading dot and the missing suffix keep it out of every listing of data files and receipts.
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def exists(url: str) -> bool:
    """Return whether the file exists now, not when its folder was last listed."""
    fs, path = filesystem(url)

    def look() -> bool:
        fs.invalidate_cache(path)
        return bool(fs.exists(path))

    return retried(f"look at {url}", look)


def names(url: str) -> list[str]:
    """Return the names of the files in the folder `url`, sorted; empty if there is no folder."""
    fs, path = filesystem(url)

    def look() -> list[str]:
        fs.invalidate_cache()
        entries = fs.ls(path, detail=True)
        return sorted(posixpath.basename(item["name"]) for item in entries if item["type"] == "file")

    try:
        return retried(f"list {url}", look)
    except FileNotFoundError:
        return []


def delete(url: str) -> None:
    """Delete the file; one that is not there is as good as deleted."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        retried(f"delete {url}", lambda: fs.rm_file(path))


def in_threads(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return `call` of every item, in order; waits on storage overlap."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, items))
