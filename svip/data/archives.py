"""Archives of strangers unpacked: plain files and folders only, inside the folder, within limits, all or nothing."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from svip.data.errors import DataError

CHUNK = 1 << 20
ALWAYS_ALLOWED = 64 << 20
"""Bytes that any archive, and any member, may unpack to."""
RATIO, MEMBER_RATIO = 20, 100
"""Beyond those, how many times its packed size: photos gain nothing, text five times, a bomb a thousand times."""
MEMBERS = 1_000_000
DEEPEST = 32
"""Folders above a file."""
LONGEST_HEADER = 1 << 20
"""Bytes between two members of a tar."""


@dataclass(frozen=True)
class _Member:
    name: str
    is_folder: bool
    content: IO[bytes] | None
    size: int
    limit: int
    """Bytes it may unpack to."""
    packed: int
    """Bytes of the archive read for it, for the progress bar."""


class Lacking(DataError):
    """A sound archive, but not with the content that was expected."""


def extract(
    archive: Path,
    into: Path,
    *,
    holds: Sequence[str] = (),
    most_bytes: int | None = None,
    most_members: int = MEMBERS,
) -> list[str]:
    """Unpack a tar, tar.gz or zip below ``into``; the names of its entries there.

    Everything is unpacked beside first: of an archive that is refused nothing is left. Existing folders are filled up
    and existing files replaced. ``most_bytes``: RATIO times the archive's size, at least ALWAYS_ALLOWED, if not given.
    Lacking where the archive has none of one of the paths ``holds``; else DataError names the member: a link, a device,
    a path out of the folder, a name twice, an encrypted or damaged member, or one beyond the limits.
    """
    size = archive.stat().st_size
    most_bytes = most_bytes or max(ALWAYS_ALLOWED, RATIO * size)
    draft = into / f".{archive.name}.unpacking"
    if draft.exists():
        shutil.rmtree(draft)  # of a process that was killed
    draft.mkdir(parents=True)
    try:
        with (
            _explained(archive),
            tqdm(total=size, desc=f"unpacking {archive.name}", unit="B", unit_scale=True, disable=None) as bar,
        ):
            left = most_bytes
            for number, member in enumerate(_members(archive, most_bytes), 1):
                if number > most_members:
                    raise DataError(f"{archive}: more than {most_members:,} members; refused")
                left -= _write(member, draft, left, archive)
                bar.update(member.packed)
        missing = [path for path in holds if not (draft / path).exists()]
        if missing:
            raise Lacking(f"{archive} holds no {', '.join(missing)}: another file, or changed; nothing was unpacked")
        entries = sorted(entry.name for entry in draft.iterdir())
        _move(draft, into)
        return entries
    finally:
        shutil.rmtree(draft)


def _members(archive: Path, most_bytes: int) -> Iterator[_Member]:
    with open(archive, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(b"PK"):
            yield from _zip_members(file, archive)
        else:
            stream: Any = gzip.GzipFile(fileobj=file) if magic.startswith(b"\x1f\x8b") else file
            yield from _tar_members(_Counted(stream, 2 * most_bytes + ALWAYS_ALLOWED, archive), file, archive)


def _tar_members(stream: _Counted, file: IO[bytes], archive: Path) -> Iterator[_Member]:
    position = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for info in tar:
            if not (info.isreg() or info.isdir()) or info.issparse():
                kind = "a link" if info.islnk() or info.issym() else "neither a plain file nor a folder"
                raise DataError(f"{archive}: member {info.name!r} is {kind}; refused")
            content = None if info.isdir() else tar.extractfile(info)
            stream.header = -info.size
            yield _Member(info.name, info.isdir(), content, info.size, info.size, file.tell() - position)
            stream.header = 0 if content is None else content.tell() - info.size  # what was not read is skipped now
            position = file.tell()
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember millions of them
    stream.drain()  # only its end brings gzip's checksum


def _zip_members(file: IO[bytes], archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as opened:
        needed, free = sum(info.file_size for info in opened.infolist()), shutil.disk_usage(archive.parent).free
        if needed > free:
            raise DataError(f"{archive}: {needed:,} bytes needed to unpack it, {free:,} free; make room")
        for info in opened.infolist():
            name = info.orig_filename  # zipfile cuts ``filename`` at a NUL
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                what = "a link" if kind == stat.S_IFLNK else "neither a plain file nor a folder"
                raise DataError(f"{archive}: member {name!r} is {what}; refused")
            if info.flag_bits & 1:
                raise DataError(f"{archive}: member {name!r} is encrypted; refused")
            if info.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):  # others ask for memory as they like
                raise DataError(f"{archive}: member {name!r} is packed in an unusual way; refused")
            limit = max(ALWAYS_ALLOWED, MEMBER_RATIO * info.compress_size)
            with opened.open(info) as content:
                folder = name.endswith("/")
                yield _Member(name, folder, None if folder else content, info.file_size, limit, info.compress_size)


def _write(member: _Member, draft: Path, left: int, archive: Path) -> int:
    """Write a member below ``draft``; its bytes. What is counted is what comes, not what the headers say."""
    parts = _parts(member.name, archive)
    if not parts or parts[0] == "__MACOSX" or parts[-1].startswith("._"):
        return 0  # the folder itself; what a Mac packs beside the files
    path = draft.joinpath(*parts)
    try:
        (path if member.is_folder else path.parent).mkdir(parents=True, exist_ok=True)
        if member.content is None:
            return 0
        written = 0
        with open(path, "xb") as target:  # x: no second member of this name, as this file system compares names
            while chunk := member.content.read(CHUNK):
                written += len(chunk)
                if written > min(left, member.limit):
                    raise DataError(
                        f"{archive}: unpacks to far more than its size, at member {member.name!r}; refused as a bomb"
                    )
                target.write(chunk)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{archive}: member {member.name!r} comes twice, or as file and folder; refused") from None
    if written != member.size:
        raise DataError(f"{archive}: ends within member {member.name!r}; it is not whole, fetch it again")
    return written


def _parts(name: str, archive: Path) -> list[str]:
    """The folders and the name of a member's path; DataError where it would lead out, or is no sane path."""
    reason = ""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if re.search(r"[\x00-\x1f\x7f\\]", name):
        reason = "has a backslash or control character in its name"
    elif name.startswith("/") or re.match("[A-Za-z]:", name):
        reason = "has an absolute path"
    elif ".." in parts:
        reason = "leads out of the folder"
    elif len(parts) > DEEPEST or any(len(os.fsencode(part)) > 255 for part in parts):
        reason = "has too deep a path or too long a name"
    if reason:
        raise DataError(f"{archive}: member {name[:200]!r} {reason}; refused")
    return parts


def _move(source: Path, target: Path) -> None:
    """Each entry to its place: a rename where there is none of that name yet."""
    for entry in source.iterdir():
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        elif place.is_dir():
            raise DataError(f"{place} is a folder where a file should go; move it away and run the same command again")
        else:
            os.replace(entry, place)


class _Counted(io.RawIOBase):
    """A stream that refuses to be longer than ``most`` bytes: headers are read before any member can be counted."""

    def __init__(self, stream: IO[bytes], most: int, archive: Path) -> None:
        self._stream, self._left, self._archive = stream, most, archive
        self._end = b""
        self.header = 0
        """Bytes that came beyond the last member: tarfile holds a header in memory, however long it is."""

    def read(self, size: int = -1) -> bytes:
        chunk = self._stream.read(size)
        self.header += len(chunk)
        if self.header > LONGEST_HEADER:
            raise DataError(f"{self._archive}: a header of more than {LONGEST_HEADER:,} bytes; refused as a bomb")
        self._left -= len(chunk)
        if self._left < 0:
            raise DataError(f"{self._archive}: unpacks to far more than its size; refused as a bomb")
        self._end = chunk[-512:] or self._end
        return chunk

    def drain(self) -> None:
        """Read to the end; DataError where that is not the end of a tar, which is zeros."""
        while self.read(CHUNK):
            pass
        if self._end.strip(b"\0"):
            raise DataError(f"{self._archive}: has no end; it is not whole, fetch it again")


@contextmanager
def _explained(archive: Path) -> Iterator[None]:
    """The libraries' errors as ours."""
    try:
        yield
    except EOFError:
        raise DataError(f"{archive}: ends too early; it is not whole, fetch it again") from None
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        zlib.error,
        NotImplementedError,
        UnicodeDecodeError,
    ) as error:
        raise DataError(f"{archive}: not a whole tar, tar.gz or zip ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{archive}: could not be unpacked ({error.strerror or error})") from error
