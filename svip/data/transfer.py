"""Files fetched from the web, from S3 or from a folder."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from svip.data.s3 import S3Source
from svip.data.sources import FileSource, HttpSource, Source, is_remote


def open_source(address: str) -> Source:
    """The source behind a path or an address with http(s)://, s3:// or file://."""
    if address.startswith("s3://"):
        return S3Source(address)
    return HttpSource(address) if is_remote(address) else FileSource(address)


def cache_folder() -> Path:
    """$SVIP_CACHE, else ~/.cache/svip."""
    return Path(os.environ.get("SVIP_CACHE") or Path.home() / ".cache" / "svip")


def local_copy(uri: str, cache: Path | None = None) -> Path:
    """A file on this machine with the content of ``uri``; a path is returned as it is.

    What http(s):// and s3:// name is downloaded to ``cache`` ($SVIP_CACHE, else ~/.cache/svip). DataError when it
    can't be fetched.
    """
    if not is_remote(uri):
        return Path(uri)
    name = re.sub(r"[^\w.+-]", "_", uri.split("?")[0].rstrip("/").rpartition("/")[2])
    target = (cache or cache_folder()) / hashlib.sha256(uri.encode()).hexdigest()[:12] / name
    if not target.exists():
        source = open_source(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{name}.{secrets.token_hex(4)}.part")
        with open(part, "wb") as file:
            file.writelines(source.read(0, None, source.describe()))
        os.replace(part, target)
    return target
