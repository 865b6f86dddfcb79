"""Credentials have no place in a URL: plans, messages and reports repeat URLs. Standard library only."""

import os
import re

from schemas.errors import SpecError

# `user:password@`, where a `host:9000/` is none; over http any `user@`, which may be a token. An Azure URL's
# `container@account` passes.
_LOGIN = re.compile(r"(?<=://)[^/@:\s]*:(?!\d+(?:/|$))[^@\s]+@|(?<=http://)[^/@\s]+@|(?<=https://)[^/@\s]+@")
# The queries of links signed by Amazon, Google and Azure, and common tokens.
_SIGNED = re.compile(
    r"([?&](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid|signature|"
    r"sig|access_token|token|api_key|password|secret)=)[^&\s\"']*",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?:SECRET|TOKEN|PASSWORD|SAS|KEY|CONNECTION_STRING)(?:_ID|_VALUE)?$")
# A shorter value would be found inside ordinary words.
_SECRET_CHARS = 8


def refuse_secrets(url: str) -> None:
    """Refuse a URL that holds a password, a token or a signature. Raises: SpecError, which does not repeat them."""
    if "://" in url and (_LOGIN.search(url) or _SIGNED.search(url)):
        raise SpecError(
            f"{without_secrets(url)}: a URL must not hold credentials, for the run's plan and messages would repeat it",
            remedy="set them in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...), or use a role",
        )


def without_secrets(text: str) -> str:
    """Return `text` with `***` for credentials in URLs, and for the values of environment variables named as secrets.

    Clients of object stores put request URLs and access keys in their errors.
    """
    text = _SIGNED.sub(r"\1***", _LOGIN.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SECRET_CHARS and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text
