"""Split bundles in an S3 bucket: a few large files, fetched once to this machine and mapped from there."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from svip.data import s3
from svip.data.bundle import Bundle, BundleError, parse_info, read_bundle
from svip.data.errors import DataError
from svip.data.prepare import Plan
from svip.data.sources import is_remote, shown
from svip.data.transfer import Expected, cache_folder, download, locked, read_bytes

log = logging.getLogger(__name__)


def open_bundle(address: str) -> Bundle:
    """The bundle in a folder, or at an s3:// or http(s):// address.

    One that is far is downloaded to ``cached_bundle`` (an interrupted download goes on), verified and kept, until the
    address has another. DataError when it can't be fetched, BundleError when it is damaged or none.
    """
    if not is_remote(address):
        return read_bundle(address)
    address, folder = address.rstrip("/"), cached_bundle(address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        record = read_bytes(f"{address}/bundle.json")
        info = parse_info(record, f"{shown(address)}/bundle.json")
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
    """Upload a bundle to ``s3://bucket/prefix``, unless it is there.

    bundle.json goes last, and that of another bundle is removed first: half a bundle is none. DataError for an address
    that is no bucket's.
    """
    check_bucket(address)
    address = address.rstrip("/")
    record = bundle.path / "bundle.json"
    try:
        if read_bytes(f"{address}/bundle.json") == record.read_bytes():
            return
        s3.remove(f"{address}/bundle.json")
    except s3.Missing:
        pass  # nothing there yet
    files = [*(bundle.path / name for name in bundle.info["files"]), record]
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="uploading", unit="B", unit_scale=True, disable=None) as progress:
        for file in files:
            s3.upload(file, f"{address}/{file.name}", progress.update)


def check_bucket(address: str) -> None:
    """DataError where no bundle can be uploaded to the address."""
    if not address.startswith("s3://"):
        raise DataError(
            f"{shown(address)}: expected s3://bucket/prefix to upload the bundle to; in a folder, on another disk or "
            "for a web server, it is its files that count: prepare it in a folder, and copy that"
        )
    s3.split_address(address)


def make_in_bucket(plan: Plan, address: str) -> dict[str, Any]:
    """Make a bundle in this machine's cache and upload it, unless the address has it; its bundle.json."""
    try:
        info = parse_info(read_bytes(f"{address.rstrip('/')}/bundle.json"), address)
        if plan.made(info):
            log.info("%s already holds this bundle; nothing to do", address)
            return info
    except (s3.Missing, BundleError):
        pass  # nothing there yet, or nothing that this svip can read
    bundle = plan.make(cached_bundle(address), replace=True)  # the bucket's owner asks for another one
    push_bundle(bundle, address)
    return bundle.info


def cached_bundle(address: str) -> Path:
    """Where this machine keeps the bundle of an address: a folder below $SVIP_CACHE, else ~/.cache/svip.

    No address's folder lies in another's, and no name shows a password.
    """
    place = shown(address.rstrip("/"))
    name = re.sub(r"[^\w.+-]", "_", place.rpartition("/")[2])
    return cache_folder() / "bundles" / hashlib.sha256(place.encode()).hexdigest()[:12] / name


def _holds(folder: Path, record: bytes) -> bool:
    try:
        return (folder / "bundle.json").read_bytes() == record
    except FileNotFoundError:
        return False
