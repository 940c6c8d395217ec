"""Credentials in URLs connect or are refused, and are in no name, message or traceback."""

from __future__ import annotations

import pickle
import re
import traceback
from pathlib import Path

import pytest

from dataengine import _patience, storage
from dataengine.storage import Store, StoreError

SECRETS = {
    "s3://AKIA:12/se+cret@bucket/x": "s3://***@bucket/x",
    "simplecache::s3://AKIA:secret@bucket/x": "simplecache::s3://***@bucket/x",
    "https://user:secret@host:9000/a@b": "https://***@host:9000/a@b",
    "https://user:sec@ret@host/x": "https://***@host/x",
    "https://secret@host/x": "https://***@host/x",
    "https://host/x?X-Amz-Signature=secret&token=secret#secret=secret": "https://host/x?X-Amz-Signature=***&token=***#secret=***",
    'Could not connect to "https://user:secret@host/x"': 'Could not connect to "https://***@host/x"',
    "aws_secret_access_key=secret": "aws_secret_access_key=***",
    "Authorization: Bearer secret": "Authorization: ***",
}
HARMLESS = (
    "s3://bucket/depth@v2/a:b@c",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/depth@v2",
    "http://127.0.0.1:9000/depth@v2/shard",
    "http://[::1]:9000/depth@v2/shard",
    "abfs://container@account.dfs.core.windows.net/x",
    "hf://datasets/name@main/x",
    "depth@v2: shard-00001 of /data/a?b=c",
)


@pytest.mark.parametrize(("text", "shown"), [*SECRETS.items(), *((text, text) for text in HARMLESS)])
def test_secrets_of_urls_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert storage.redacted(text) == shown
    assert storage.redacted(shown) == shown


def test_a_root_has_a_name_without_secrets_and_a_url_that_connects(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(Store("https://user:secret@host/root/")))
    assert (store.url, store.name) == ("https://user:secret@host/root", "https://***@host/root")
    assert Store(tmp_path).name == Store(tmp_path).url == str(tmp_path)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://AKIA:secret@bucket/x", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs://secret@bucket/x", "set GOOGLE_APPLICATION_CREDENTIALS"),
        ("https://host/x?X-Amz-Signature=secret", "a dataset root has no ?query"),
        ("simplecache::https://user:secret@host/x", "no chain"),
    ],
)
def test_credentials_that_would_not_work_are_refused_and_not_shown(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        Store(url)
    assert "secret" not in str(refused.value)
    if url.startswith(("s3", "gs")):
        with pytest.raises(ValueError, match=re.escape(reason)):
            storage.open_url(url)


def test_an_error_of_the_store_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_patience, "patience", _patience.Patience(attempts=2, first=0.001))
    password = "-".join(["hush", "hush"])  # so that no line of this file holds it
    with pytest.raises(StoreError) as failed:
        Store(f"http://user:{password}@127.0.0.1:1/root").read("plan.json")
    shown = "".join(traceback.format_exception(failed.value))
    assert "http://***@127.0.0.1:1/root/plan.json failed (tried 2 times)" in shown
    assert password not in shown
    again = pickle.loads(pickle.dumps(failed.value))
    assert (str(again), again.errno) == (str(failed.value), failed.value.errno)
