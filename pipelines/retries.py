"""Storage calls, tried again while their errors may pass: a store that is down for minutes costs time, never a row."""

import errno
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from pipelines.giving_up import GIVEN_UP
from schemas.errors import GivenUp, StorageError
from schemas.urls import without_secrets

R = TypeVar("R")

BUDGET_S = 600.0
"""Seconds for which one call is tried. Tests shorten this and the two below."""

FIRST_WAIT_S = 0.5
"""The first wait is drawn between 0 and this, each later one up to twice as long: callers that failed together, because
the store throttled them, do not come back together."""

MAX_WAIT_S = 30.0

_TELL_AFTER_S = 10.0

# The same answer would come again: a retry only hides it.
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)
_FINAL_ERRNOS = frozenset({
    errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EFBIG, errno.EROFS,
    errno.ENOSPC, errno.EDQUOT, errno.EPERM,
})  # fmt: skip
# Errors of these packages are not OSError.
_NETWORK_PACKAGES = frozenset({"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx"})
# Of those, and by any name of the error's bases, the ones about a connection or a credential service, not the request.
_PASSING_NAMES = frozenset({
    "ClientError",  # aiohttp; botocore's has a status and is judged by it
    "HTTPClientError", "ConnectionError", "ResponseParserError", "IncompleteReadError", "FlexibleChecksumError",
    "CredentialRetrievalError", "MetadataRetrievalError",  # botocore, which asks the machine for its role
    "ServiceRequestError", "ServiceResponseError",  # azure
    "ChecksumError",  # gcsfs
    "TransportError",  # google.auth, httpx
})  # fmt: skip
_PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
# S3 sends these as 400, 403 or 409, which are final otherwise.
_PASSING_CODES = frozenset({
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout",
    "RequestTimeTooSkewed", "Throttling", "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
})  # fmt: skip


def retried(what: str, call: Callable[[], R]) -> R:
    """Return `call()`, tried again on errors that may pass, for `BUDGET_S`. `what` completes "cannot ...".

    Once the run is given up, nothing is tried again.

    Raises: StorageError, at once if the error is final; FileNotFoundError at once; GivenUp.
    """
    try:
        return call()  # without tenacity, which takes 40 µs: a million receipts are two million calls
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not may_pass(error):
            raise
        failure = error
    return _tried_again(what, call, failure)


def _tried_again(what: str, call: Callable[[], R], failure: Exception) -> R:
    """Return what `retried` does after the first attempt, which raised `failure`."""
    told, is_first = False, True

    def attempt() -> R:
        nonlocal failure, is_first
        if is_first or GIVEN_UP.is_set():
            is_first = False
            raise failure
        try:
            return call()
        except Exception as error:
            failure = error
            raise

    def tell(state: RetryCallState) -> None:
        nonlocal told
        elapsed = state.seconds_since_start or 0.0
        if not told and elapsed > _TELL_AFTER_S and state.outcome is not None:
            told = True
            reason = _text(state.outcome.exception())
            logging.getLogger(__name__).warning(
                "cannot %s since %.0f s: %s; trying up to %.0f s", what, elapsed, reason, BUDGET_S
            )

    attempts = Retrying(
        stop=stop_any(stop_after_delay(BUDGET_S), stop_when_event_set(GIVEN_UP)),
        sleep=sleep_using_event(GIVEN_UP),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S),
        retry=retry_if_exception(may_pass),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return attempts(attempt)
    except FileNotFoundError:
        raise
    except Exception as error:
        if not _is_storage_error(error):
            raise
        if GIVEN_UP.is_set() and may_pass(error):
            remedy = "the run had to end; run the same job again once the store answers: it resumes"
            raise GivenUp(f"cannot {what}: {_text(error)} (given up with the run)", remedy=remedy) from error
        tries = attempts.statistics["attempt_number"]
        tried = f" ({tries} attempts in {BUDGET_S:g} s)" if tries > 1 else ""
        remedy = "check the store, its credentials and the free space; then run the same job again: it resumes"
        raise StorageError(f"cannot {what}: {_text(error)}{tried}", remedy=remedy) from error


def may_pass(error: BaseException) -> bool:
    """Return whether the call that raised `error` may succeed later, unchanged: throttling, resets, time-outs."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__  # adlfs hides some of Azure's errors in one
    code, status = _answer(error)
    if code in _PASSING_CODES:
        return True
    if isinstance(error, _FINAL):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if status is not None:
        return status in _PASSING_STATUSES
    if isinstance(error, OSError):
        # gcsfs has nothing but a text for a refused access.
        return error.errno not in _FINAL_ERRNOS and not str(error).startswith("Forbidden: ")
    names = {base.__name__ for base in type(error).__mro__}
    return _is_storage_error(error) and not names.isdisjoint(_PASSING_NAMES)


def _is_storage_error(error: BaseException | None) -> bool:
    if type(error) is RuntimeError:
        return _is_storage_error(error.__cause__)
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


def _answer(error: BaseException) -> tuple[str | None, int | None]:
    """Return the store's code for the error and the HTTP status, as far as the error tells."""
    # s3fs raises an OSError from what botocore told.
    response: Any = getattr(error if hasattr(error, "response") else error.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((error, "status"), (error, "status_code"), (error, "code"), (response, "status_code")):
        number = str(getattr(holder, name, ""))
        if number.isdigit():
            return None, int(number)
    return None, None


def _text(error: BaseException | None) -> str:
    return without_secrets(f"{type(error).__name__}: {error}")
