"""Split bundles in an S3 bucket: a few large files, fetched once to this machine and mapped from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from svip.data.bundle import Bundle, BundleError, parse_info, read_bundle
from svip.data.s3 import Missing, upload_folder
from svip.data.sources import is_remote
from svip.data.transfer import Expected, cache_folder, download, open_source


def open_bundle(address: str) -> Bundle:
    """The bundle in a folder, or at an s3:// or http(s):// address.

    One that is far is downloaded to ``cached_bundle`` (an interrupted download goes on), verified and kept, until the
    address has another. DataError when it can't be fetched, BundleError when it is damaged or none.
    """
    if not is_remote(address):
        return read_bundle(address)
    address, folder = address.rstrip("/"), cached_bundle(address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        record = _record(address)
        info = parse_info(record, f"{address}/bundle.json")
        if _holds(folder, record):
            return read_bundle(folder)
        # a name of its own for each content: what was begun of another one is of no use
        part = folder.with_name(f".{folder.name}.{info['sha256'][:12]}.part")
        for name, size in info["files"].items():
            download([f"{address}/{name}"], part / name, Expected(size=size))
        (part / "bundle.json").write_bytes(record)
        try:
            read_bundle(part).verify()
        except BundleError:
            shutil.rmtree(part)
            raise
        for file in part.iterdir():
            if file.name not in {*info["files"], "bundle.json"}:
                file.unlink()  # notes of the download
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    return read_bundle(folder)


def push_bundle(bundle: Bundle, address: str) -> None:
    """Upload a bundle to ``s3://bucket/prefix``, unless it is there; bundle.json last, so that no half one is found."""
    address = address.rstrip("/")
    record = (bundle.path / "bundle.json").read_bytes()
    try:
        if _record(address) == record:
            return
    except Missing:
        pass  # nothing there yet
    upload_folder(bundle.path, address, last="bundle.json")


def cached_bundle(address: str) -> Path:
    """Where this machine keeps the bundle of an address: below $SVIP_CACHE, else ~/.cache/svip."""
    parts = urlsplit(address)
    return cache_folder() / "bundles" / parts.netloc / parts.path.strip("/")


def _record(address: str) -> bytes:
    source = open_source(f"{address}/bundle.json")
    return b"".join(source.read(0, None, source.describe()))


def _holds(folder: Path, record: bytes) -> bool:
    try:
        return (folder / "bundle.json").read_bytes() == record
    except FileNotFoundError:
        return False
