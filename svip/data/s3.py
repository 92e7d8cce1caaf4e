"""Everything that speaks S3; credentials and endpoint come from the usual places of boto3 (AWS_ENDPOINT_URL_S3 ...)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.exceptions

from svip.data.errors import DataError
from svip.data.sources import CHUNK, CONNECT, STALL, Changed, Description, Interrupted, exactly, seconds_asked, shown

if TYPE_CHECKING:
    import boto3
    from botocore.client import BaseClient

PART = 8 << 20
"""Bytes of one part of an upload; larger files go up in parts, each repeated by itself."""
NOT_THERE = {"404", "NoSuchKey", "NotFound"}


@functools.cache
def session() -> boto3.Session:
    """What the clients of this process share: credentials, and descriptions that take long to load."""
    import boto3  # takes a quarter of a second, which only those who use S3 should wait for

    return boto3.Session()


@functools.cache
def client(attempts: int = 6) -> BaseClient:
    """The client of this process that tries so often by itself; DataError where the settings of AWS are faulty."""
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT,
        read_timeout=STALL,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=16,
        # the newer checksums are unknown to many servers that are not Amazon's
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with translated("S3"):
        made = session().client("s3", config=config)
        if not (urlsplit(made.meta.endpoint_url).hostname or "").endswith("amazonaws.com"):
            # bucket.host names exist on few servers of one's own
            made = session().client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    return made


def split_address(address: str) -> tuple[str, str]:
    """``s3://bucket/some/key`` -> (bucket, some/key); DataError when it has no bucket."""
    parts = urlsplit(address)
    if parts.scheme != "s3" or not parts.netloc:
        raise DataError(f"{address}: expected s3://bucket/prefix")
    return parts.netloc, parts.path.strip("/")


class S3Source:
    """An object; see ``sources.Source``. Who reads it has the patience, so each request is made but once."""

    def __init__(self, address: str) -> None:
        self.address = shown(address)
        self._bucket, self._key = split_address(address)

    def describe(self) -> Description:
        with translated(self.address):
            head = client(1).head_object(Bucket=self._bucket, Key=self._key)
        return Description(int(head["ContentLength"]), head.get("ETag"), ranges=True)

    def read(self, start: int, stop: int | None, of: Description) -> Iterator[bytes]:
        stop = of.size if stop is None else stop
        assert stop is not None  # S3 always says the size
        if start == stop:
            return
        with translated(self.address):
            answer = client(1).get_object(
                Bucket=self._bucket,
                Key=self._key,
                Range=f"bytes={start}-{stop - 1}",
                **({"IfMatch": of.version} if of.version else {}),
            )
            wanted = f"bytes {start}-{stop - 1}/{of.size}"
            if answer.get("ETag") != of.version:
                raise Changed(f"{self.address} was changed while it was being fetched")
            if answer.get("ContentRange") != wanted:
                raise Interrupted(f"{self.address}: asked for {wanted}, answered {answer.get('ContentRange')}")
            yield from exactly(answer["Body"].iter_chunks(CHUNK), stop - start, self.address)


def upload(file: Path, address: str, progress: Callable[[int], Any] | None = None) -> None:
    """Upload one file, large ones in parallel parts; ``progress`` is told the bytes of each step.

    An object appears whole or not at all. DataError when what arrived has another size.
    """
    from boto3.s3.transfer import TransferConfig

    bucket, key = split_address(address)
    config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)
    with translated(address), open(file, "rb") as body:  # upload_file would wrap the errors
        client().upload_fileobj(body, bucket, key, Config=config, Callback=progress)
        found = client().head_object(Bucket=bucket, Key=key)["ContentLength"]
    size = file.stat().st_size
    if found != size:
        raise DataError(f"{address}: {found:,} bytes arrived of {size:,}; upload it again")


def fetch(address: str, file: Path) -> None:
    """Write one object to ``file``, large ones in parallel parts; DataError when another size arrives.

    The file is no safer than its folder: it is for who knows what to do with half of it (else see ``transfer``).
    """
    from boto3.s3.transfer import TransferConfig

    bucket, key = split_address(address)
    config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=4)
    with translated(address):
        size = client().head_object(Bucket=bucket, Key=key)["ContentLength"]
        with open(file, "wb") as body:
            client().download_fileobj(bucket, key, body, Config=config)
    found = file.stat().st_size
    if found != size:
        raise DataError(f"{address}: {found:,} bytes arrived of {size:,}; fetch it again")


def names(address: str) -> list[str]:
    """The names of all objects below ``s3://bucket/prefix``, as they go on after it."""
    bucket, prefix = split_address(f"{address.rstrip('/')}/")
    with translated(address):
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Contents", [])]


def remove(address: str) -> None:
    """Remove one object, if there is such."""
    bucket, key = split_address(address)
    with translated(address):
        client().delete_object(Bucket=bucket, Key=key)


class Missing(DataError):
    """There is no such object."""


@contextmanager
def translated(address: str) -> Iterator[None]:
    """boto3's errors as ours: what is worth another try is Interrupted, all else says what to do."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        raise _client_error(address, error) from None  # the answer may quote the signed request
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError):
        raise DataError(
            f"{address}: no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from None
    except (
        botocore.exceptions.ConnectionError,
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.IncompleteReadError,
    ) as error:
        kind = type(error).__name__
        raise Interrupted(
            f"{address}: {client_endpoint()} can't be reached, or cut the connection ({kind}); check AWS_ENDPOINT_URL"
        ) from None
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{address}: the settings of S3 are not usable ({error})") from None
    except OSError as error:
        raise Interrupted(f"{address}: the connection was cut ({type(error).__name__})") from None


def client_endpoint() -> str:
    return str(client().meta.endpoint_url)


def _client_error(address: str, error: botocore.exceptions.ClientError) -> DataError:
    details = error.response.get("Error", {})
    answer = error.response.get("ResponseMetadata", {})
    code, status = str(details.get("Code", "")), answer.get("HTTPStatusCode", 0)
    bucket = urlsplit(address).netloc
    if code == "NoSuchBucket":
        return DataError(f"{address}: there is no bucket {bucket} at {client_endpoint()}; make it, or check the name")
    if code in NOT_THERE:
        return Missing(f"{address}: there is no such object, or no bucket {bucket}")
    if code in ("412", "PreconditionFailed", "416", "InvalidRange"):
        return Changed(f"{address} was changed while it was being fetched")
    if status in (401, 403):
        return DataError(
            f"{address}: access denied ({code}); check the credentials and that they may read and write {bucket}"
        )
    if status >= 500 or status == 429 or "SlowDown" in code or code == "RequestTimeout":
        wait = seconds_asked(answer.get("HTTPHeaders", {}).get("retry-after", ""))
        return Interrupted(f"{address}: answered {status} {code}", wait)
    return DataError(f"{address}: answered {status} {code}")
