"""Which errors of a store may pass, how long a call is tried for, and what its error says."""

import errno
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import retries
from pipelines.giving_up import GIVEN_UP
from pipelines.retries import may_pass, retried
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
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 0.002)


REQUEST = SimpleNamespace(real_url="http://store/a")


def translated(code: str, status: int) -> Exception:
    """Return what s3fs makes of S3's answer."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer: Any = {"Error": {"Code": code, "Message": "so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(answer, "PutObject"))
    return error


def botocore(name: str, **parts: object) -> Exception:
    import botocore.exceptions

    error: Exception = getattr(botocore.exceptions, name)(**parts)
    return error


def aiohttp(name: str, *parts: Any, **more: Any) -> Exception:
    import aiohttp

    error: Exception = getattr(aiohttp, name)(*parts, **more)
    return error


def cut_short() -> Exception:
    """Return what aiohttp raises of a body that ends too early; its cause has a code of 400, which is no answer."""
    from aiohttp.http_exceptions import ContentLengthError

    error = aiohttp("ClientPayloadError", "Response payload is not completed")
    error.__cause__ = ContentLengthError("Not enough data to satisfy content length header")
    return error


def gcs(code: int) -> Exception:
    from gcsfs.retry import HttpError

    error: Exception = HttpError({"code": code, "message": "so"})
    return error


def azure(name: str, status: int | None = None) -> Exception:
    import azure.core.exceptions

    error: Exception = getattr(azure.core.exceptions, name)("so")
    if status is not None:
        error.status_code = status  # type: ignore[attr-defined]
    return error


def hidden_azure() -> Exception:
    error = RuntimeError("Failed to upload block: so!")
    error.__cause__ = azure("ServiceResponseError")
    return error


def google(name: str, **more: Any) -> Exception:
    import google.auth.exceptions

    error: Exception = getattr(google.auth.exceptions, name)("so", **more)
    return error


PASSING: dict[str, Callable[[], Exception]] = {
    "plain": lambda: OSError("reset"),
    "time-out": lambda: TimeoutError("slow"),
    "reset": lambda: ConnectionResetError(errno.ECONNRESET, "reset"),
    "short": lambda: OSError(errno.EIO, "10 bytes came, expected 20"),
    "SlowDown": lambda: translated("SlowDown", 503),
    "503 of a HEAD": lambda: translated("503", 503),
    "429": lambda: translated("TooManyRequests", 429),
    "unknown to s3fs": lambda: translated("ThrottlingException", 400),
    "minio": lambda: translated("XMinioServerNotInitialized", 503),
    "InternalError": lambda: translated("InternalError", 500),
    "RequestTimeout": lambda: translated("RequestTimeout", 400),
    "IncompleteBody": lambda: translated("IncompleteBody", 400),
    "OperationAborted": lambda: translated("OperationAborted", 409),
    "clock": lambda: translated("RequestTimeTooSkewed", 403),
    "no route": lambda: botocore("EndpointConnectionError", endpoint_url="http://store"),
    "closed": lambda: botocore("ConnectionClosedError", endpoint_url="http://store"),
    "role": lambda: botocore("CredentialRetrievalError", provider="iam", error_msg="so"),
    "cut short": cut_short,
    "disconnected": lambda: aiohttp("ServerDisconnectedError"),
    "http 503": lambda: aiohttp("ClientResponseError", None, (), status=503),
    "gcs 429": lambda: gcs(429),
    "gcs 500": lambda: gcs(500),
    "google": lambda: google("TransportError"),
    "azure": lambda: azure("ServiceRequestError"),
    "azure 503": lambda: azure("HttpResponseError", 503),
    "azure, hidden": hidden_azure,
}

FINAL: dict[str, Callable[[], Exception]] = {
    "no file": lambda: FileNotFoundError("no"),
    "no bucket": lambda: translated("NoSuchBucket", 404),
    "no access": lambda: translated("AccessDenied", 403),
    "wrong key": lambda: translated("SignatureDoesNotMatch", 403),
    "expired": lambda: translated("ExpiredToken", 400),
    "bad request": lambda: translated("InvalidArgument", 400),
    "unknown request": lambda: translated("Nonsense", 400),
    "taken": lambda: translated("PreconditionFailed", 412),
    "no credentials": lambda: botocore("NoCredentialsError"),
    "bad name": lambda: botocore("ParamValidationError", report="so"),
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "read-only": lambda: OSError(errno.EROFS, "Read-only file system"),
    "http 401": lambda: aiohttp("ClientResponseError", REQUEST, (), status=401),
    "gcs 403": lambda: OSError("Forbidden: bucket/name\nno storage.objects.get"),
    "gcs 401": lambda: gcs(401),
    "google": lambda: google("DefaultCredentialsError"),
    "azure 403": lambda: azure("ClientAuthenticationError", 403),
    "bug": lambda: ValueError("so"),
    "bug of a runtime": lambda: RuntimeError("so"),
}


@pytest.mark.parametrize("name", PASSING)
def test_errors_that_may_pass(name: str) -> None:
    assert may_pass(PASSING[name]())
    flaky = Flaky(PASSING[name](), failures=3)
    assert retried("read it", flaky) == "answer"
    assert flaky.calls == 4


@pytest.mark.parametrize("name", FINAL)
def test_final_errors(name: str) -> None:
    flaky = Flaky(FINAL[name](), failures=1)
    expected = (StorageError, FileNotFoundError) if "bug" not in name else (ValueError, RuntimeError)
    with pytest.raises(expected):
        retried("read it", flaky)
    assert flaky.calls == 1


def test_the_budget_is_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BUDGET_S", 0.2)
    flaky = Flaky(OSError("reset"), failures=10**9)
    with pytest.raises(StorageError, match=r"cannot read it: OSError: reset \(\d+ attempts in 0\.2 s\)") as caught:
        retried("read it", flaky)
    assert flaky.calls > 10  # 0.2 s in waits of 2 ms at most
    assert "resumes" in caught.value.remedy


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(GIVEN_UP, "wait", lambda timeout: waits.append(timeout))
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(retries, "MAX_WAIT_S", 16.0)
    monkeypatch.setattr(retries, "BUDGET_S", 60.0)
    for _ in range(20):
        retried("read it", Flaky(OSError("reset"), failures=8))
    rounds = [waits[start : start + 8] for start in range(0, len(waits), 8)]
    for index, limit in enumerate((1, 2, 4, 8, 16, 16, 16, 16)):
        drawn = [round_[index] for round_ in rounds]
        assert max(drawn) <= limit
        assert max(drawn) > limit / 2
        assert len(set(drawn)) == 20


def test_a_long_wait_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_TELL_AFTER_S", 0.02)
    with caplog.at_level(logging.WARNING):
        retried("read it", Flaky(OSError("reset"), failures=60))
    assert len(caplog.messages) == 1
    assert "cannot read it since 0 s: OSError: reset; trying up to 600 s" in caplog.text


def test_secrets_stay_out_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    error = PermissionError("signed with wJalrXUtnFEMI/K7MDENG at https://me:pass@store/a?X-Amz-Signature=abc&b=1")
    with pytest.raises(StorageError) as caught:
        retried("read it", Flaky(error, failures=1))
    assert caught.value.message.endswith("signed with *** at https://***@store/a?X-Amz-Signature=***&b=1")
