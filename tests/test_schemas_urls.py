"""URLs with credentials are refused, without repeating them; other URLs are not."""

import pytest

from schemas.errors import SpecError
from schemas.urls import refuse_secrets, without_secrets

SECRET = "sEcReT0123"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAX:{SECRET}@bucket/in/",
        f"s3://AKIAX:{SECRET[:5]}/{SECRET}+=@bucket/in/*.parquet",
        f"https://me:{SECRET}@host/a.parquet",
        f"https://{SECRET}@host/a.parquet",
        f"sftp://me:{SECRET}@host:22/a",
        f"filecache::s3://AKIAX:{SECRET}@bucket/in",
        f"https://b.s3.amazonaws.com/a?X-Amz-Algorithm=A&X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
        f"https://account.blob.core.windows.net/c/a.parquet?sv=2024&sig={SECRET}",
        f"https://storage.googleapis.com/b/a?x-goog-signature={SECRET}",
        f"https://host/a.parquet?token={SECRET}",
    ],
)
def test_credentials_are_refused(url: str) -> None:
    with pytest.raises(SpecError, match="must not hold credentials") as caught:
        refuse_secrets(url)
    assert SECRET not in str(caught.value)
    assert SECRET[:5] not in str(caught.value)
    assert "environment" in caught.value.remedy


@pytest.mark.parametrize(
    "url",
    [
        "/data/a@b:c/d?sig=1.parquet",
        "s3://bucket/in@2x/key:1@2/part-?.parquet",
        "s3://bucket/a?b=1.parquet",
        "abfs://container@account.dfs.core.windows.net/in/*.parquet",
        "http://host:9000/a@b.parquet",
        "sftp://me@host/in/a.parquet",
        "memory://in/[a-z]?.parquet",
        "file:///data/x@y",
    ],
)
def test_others_are_not(url: str) -> None:
    refuse_secrets(url)


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AZURE_STORAGE_SAS_TOKEN"):
        monkeypatch.setenv(name, f"{SECRET}-{name.lower()}")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    monkeypatch.setenv("SHORT_KEY", "key")
    text = f"{SECRET}-aws_access_key_id, {SECRET}-aws_session_token: no key in /var/run/token"
    assert without_secrets(text) == "***, ***: no key in /var/run/token"
