"""Two hosts, each with its address and the other across a cable that can be pulled: network namespaces, S3 between."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from distributed import Client

from jobs.verify import verify
from pipelines.commit import done_units, write_plan
from pipelines.finalize import finalize
from pipelines.runners import run_units
from schemas.runs import Plan
from tests.clusters import scheduler, wait_until, worker
from tests.fakes import fake_plan, open_slow_fake_engine, tickets

NEAR, FAR = (f"10.213.{os.getpid() % 250}.{number}" for number in (1, 2))
HOST = f"k2batch-{os.getpid()}"
CABLE = f"k2b{os.getpid()}"

pytestmark = pytest.mark.soak


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def far_host() -> Iterator[Sequence[str]]:
    """The words before a command that run it on the other host."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip`")
    with ExitStack() as stack:
        try:
            ip("netns", "add", HOST)
            stack.callback(ip, "netns", "delete", HOST)
            ip("link", "add", CABLE, "type", "veth", "peer", "name", "eth0", "netns", HOST)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace here: {error.stderr.decode().strip()}")
        ip("address", "add", f"{NEAR}/24", "dev", CABLE)
        ip("link", "set", CABLE, "up")
        ip("-netns", HOST, "address", "add", f"{FAR}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-netns", HOST, "link", "set", device, "up")
        yield ("ip", "netns", "exec", HOST)


@pytest.fixture
def bucket(far_host: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a server that both hosts reach."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=NEAR, port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NEAR}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"tickets-{time.monotonic_ns()}"  # moto's servers of one process share what they hold
    s3fs.S3FileSystem().call_s3("create_bucket", Bucket=name)
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def planned(bucket: str) -> Plan:
    """Return a written plan of 30 units."""
    for number in range(6):
        with fsspec.open(f"{bucket}/in/{number}.parquet", "wb") as file:
            pq.write_table(tickets(50, start=50 * number), file, row_group_size=10)
    plan = fake_plan([f"{bucket}/in/"], f"{bucket}/out/", unit_rows=10)
    write_plan(plan)
    return plan


@pytest.mark.parametrize("cable", ["sound", "pulled_for_2_s", "cut"])
def test_two_hosts_share_a_run(
    tmp_path: Path, far_host: Sequence[str], bucket: str, monkeypatch: pytest.MonkeyPatch, cable: str
) -> None:
    monkeypatch.setenv("K2_FAKE_LOG", str(tmp_path / "log"))
    # After which a silent connection counts as lost; 30 s by default, 11 s at least.
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", "11s")
    plan = planned(bucket)

    def pull() -> None:
        wait_until(lambda: len(done_units(plan)) >= 4, "4 units done")
        ip("-netns", HOST, "link", "set", "eth0", "down")
        if cable == "pulled_for_2_s":
            time.sleep(2)
            ip("-netns", HOST, "link", "set", "eth0", "up")

    with (
        scheduler(tmp_path, host=NEAR) as (address, _),
        worker(tmp_path, address, inside=far_host),
        worker(tmp_path, address, "--host", NEAR),
    ):
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            hosts = {info["host"] for info in client.scheduler_info()["workers"].values()}
        assert hosts == {NEAR, FAR}
        puller = threading.Thread(target=pull, daemon=True)
        if cable != "sound":
            puller.start()
        run_units(plan, plan.units, runner="dask", dask_address=address, open_engine=open_slow_fake_engine)
        if cable != "sound":
            puller.join(timeout=60)
    assert len({line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}) == 2
    assert finalize(plan, max_reject_rate=0.0).status == "complete"
    assert verify(plan.output) == []
