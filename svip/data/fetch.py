"""Data sets fetched into a folder, from their owners or from a mirror, and mirrors made of what was fetched.

Below the root: ``archives/NAME`` as downloaded, ``archives/NAME.json`` with what is known of it, and what it holds
where ``catalog`` looks for it. A mirror is a flat folder (on S3, on a web server, on a disk) of the archives, each with
``NAME.parts.json``: its size, its sha256, and that of each piece of it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from tqdm import tqdm

from svip.data import s3
from svip.data.archives import Lacking, extract
from svip.data.catalog import CATALOG, PACKAGES, Archive
from svip.data.errors import DataError
from svip.data.pieces import PIECE, piece_digests, write_json
from svip.data.sources import CHUNK, Interrupted, is_remote, shown
from svip.data.transfer import FOUND, Expected, Record, download, locked, need_room, open_source, read_bytes
from svip.nearest import did_you_mean

log = logging.getLogger(__name__)

WEB = "web"
"""In place of a mirror: the addresses of the owners."""


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What is there of one archive."""

    archive: Archive
    downloaded: bool
    complete: bool
    """All that it must hold is unpacked; of a file that is not unpacked, that it was downloaded."""
    record: Record | None
    """None where it was put there by other means, and so never checked."""


def fetch(
    name: str, root: Path, mirror: str = WEB, *, discard_archives: bool = False, again: bool = False
) -> list[Presence]:
    """Download, check and unpack what ``name`` consists of ("all": every data set), and say what is there.

    ``mirror``: ``web``, or the s3:// address, URL or folder that ``mirror`` filled. What is complete is not touched,
    unless ``again``: then its archives are unpacked over it, and fetched where they are not there.
    ``discard_archives`` removes each archive once it is unpacked. DataError when an archive can't be fetched.
    """
    for archive in archives_of(name):
        place, there = _place(archive, root), presence(archive, root)
        discard = discard_archives and bool(archive.holds)
        if there.complete and not again and not (discard and there.downloaded):
            _say_found(there, root)
            continue  # without a lock: the root may be one that can only be read
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place):
            if again or not presence(archive, root).complete:
                _fetch_archive(archive, root, mirror)
            if discard:
                place.unlink(missing_ok=True)
    return present(name, root)


def mirror(name: str, root: Path, to: str) -> list[str]:
    """Copy the archives of ``name`` below ``root`` to the folder or s3:// address ``to``; the names of those copied.

    An archive goes first and its checksums last; what is there with the same checksum is skipped. DataError where an
    archive was not fetched, or is not the published one; those that come after it are copied all the same.
    """
    if is_remote(to) and not to.startswith("s3://"):
        raise DataError(f"{shown(to)}: files can be put on s3://bucket/prefix or into a folder")
    copied, absent = [], []
    for archive in archives_of(name):
        place = _place(archive, root)
        if not place.exists():
            absent.append(archive)
            continue
        record = download((), place, _published(archive))  # checks it, unless that was done
        if _is_mirrored(archive, record, to):
            log.info("%s is mirrored already", archive.name)
            continue
        parts = {"size": record.size, "sha256": record.sha256, "piece": PIECE, "pieces": piece_digests(place)}
        _put(place, _join(to, archive.name))
        with TemporaryDirectory() as folder:
            notes = Path(folder) / f"{archive.name}.parts.json"
            write_json(notes, parts)
            _put(notes, _join(to, notes.name))
        copied.append(archive.name)
    if absent:
        again = " --again" if any(presence(archive, root).complete for archive in absent) else ""
        places = ", ".join(str(_place(archive, root)) for archive in absent)
        raise DataError(
            f"{places} {'is' if len(absent) == 1 else 'are'} not there; run `svip fetch {name} --root {root}{again}` "
            "first, without --discard-archives" + (f" ({', '.join(copied)} were copied)" if copied else "")
        )
    return copied


def present(name: str, root: Path) -> list[Presence]:
    """What is there of each archive of ``name``."""
    return [presence(archive, root) for archive in archives_of(name)]


def presence(archive: Archive, root: Path) -> Presence:
    """What was unpacked by other means is taken for complete as soon as all of ``holds`` exists."""
    place = _place(archive, root)
    record, downloaded = Record.read(place), place.exists()
    if archive.holds:
        held = all((root / archive.folder / path).exists() for path in archive.holds)
        complete = held and (record is None or record.extracted is not None)
    else:
        complete = downloaded and record is not None
    return Presence(archive=archive, downloaded=downloaded, complete=complete, record=record)


def _say_found(there: Presence, root: Path) -> None:
    if there.record:
        log.info("%s is there", there.archive.name)
        return
    log.warning(
        "what %s holds was found in %s, not checked; `svip fetch --again` replaces it",
        there.archive.name,
        root / there.archive.folder,
    )


def archives_of(name: str) -> list[Archive]:
    """The archives of a data set or of word vectors, "all" for those of all data sets; DataError for another name."""
    if name != "all" and name not in PACKAGES:
        hint = did_you_mean(name, PACKAGES)
        raise DataError(f"nothing to fetch is called {name!r}; {hint}there are: {', '.join(PACKAGES)}, all")
    packages = CATALOG.values() if name == "all" else [PACKAGES[name]]
    return list(dict.fromkeys(archive for package in packages for archive in package.archives))


def _place(archive: Archive, root: Path) -> Path:
    return root / "archives" / archive.name


def _published(archive: Archive) -> Expected:
    return Expected(size=archive.size, md5=archive.md5, sha256=archive.sha256)


def _fetch_archive(archive: Archive, root: Path, mirror: str) -> None:
    place, expected, addresses = _place(archive, root), _published(archive), archive.urls
    if mirror != WEB:
        addresses = (_join(mirror, archive.name),)
        expected = _as_mirrored(archive, place, mirror) or expected
    record = download(addresses, place, expected, room=1 + archive.unpacked if archive.holds else 1.0)
    if not archive.holds:
        return
    folder = root / archive.folder
    folder.mkdir(parents=True, exist_ok=True)
    need_room(folder, int(archive.unpacked * record.size), f"unpack {archive.name}")
    # a kill while it is unpacked must not look like the end of an earlier time
    record = dataclasses.replace(record, extracted=None)
    record.write(place)
    try:
        entries = extract(place, folder, holds=archive.holds)
    except Lacking:
        if archive.sha256 is None and archive.md5 is None:  # the right file must not be held against this one
            Record.path(place).unlink()
            if record.source != FOUND:
                place.unlink()
        raise
    dataclasses.replace(record, extracted=entries).write(place)


def _as_mirrored(archive: Archive, place: Path, mirror: str) -> Expected | None:
    """What the mirror's notes say; None where it has none for this archive (somebody's folder of downloads)."""
    notes, known = _notes(archive, mirror), Record.read(place)
    if notes is None:
        log.warning("%s has no %s.parts.json: only the whole file can be checked", shown(mirror), archive.name)
        return None
    if archive.sha256 not in (None, notes["sha256"]):
        raise DataError(f"{shown(mirror)}: its {archive.name} is not the published one; mirror it again")
    if archive.sha256 is None and known and known.sha256 != notes["sha256"]:
        raise DataError(
            f"{shown(mirror)}: its {archive.name} is another than the one fetched {known.fetched} from {known.source}; "
            f"if its owners changed it since, remove {place} and {Record.path(place)} and run the same command again"
        )
    pieces = tuple(notes["pieces"]) if notes["piece"] == PIECE else ()
    return Expected(
        size=notes["size"],
        md5=archive.md5,
        sha256=notes["sha256"],
        pieces=pieces,
        known_from=f"as mirrored at {shown(mirror)}",
    )


def _notes(archive: Archive, mirror: str) -> dict[str, Any] | None:
    address = _join(mirror, f"{archive.name}.parts.json")
    try:
        text = read_bytes(address)
    except Interrupted:
        raise
    except DataError:
        return None
    try:
        notes = json.loads(text)
        if (
            {type(notes["size"]), type(notes["piece"])} == {int}
            and isinstance(notes["pieces"], list)
            and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in [notes["sha256"], *notes["pieces"]])
        ):
            return dict(notes)
    except (ValueError, TypeError, KeyError):
        pass
    raise DataError(f"{shown(address)} does not hold the checksums of an archive; remove it, or mirror again")


def _is_mirrored(archive: Archive, record: Record, to: str) -> bool:
    notes = _notes(archive, to)
    if notes is None or notes["sha256"] != record.sha256:
        return False
    try:
        return open_source(_join(to, archive.name)).describe().size == record.size
    except Interrupted:
        raise
    except DataError:
        return False


def _put(file: Path, address: str) -> None:
    size = file.stat().st_size
    with tqdm(total=size, desc=f"mirroring {file.name}", unit="B", unit_scale=True, disable=None) as bar:
        if address.startswith("s3://"):
            s3.upload(file, address, bar.update)
            return
        target = Path(address)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid4().hex}.draft")  # another machine may be at it too
        try:
            with open(file, "rb") as source, open(draft, "xb") as copy:
                while chunk := source.read(CHUNK):
                    copy.write(chunk)
                    bar.update(len(chunk))
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


def _join(folder: str, name: str) -> str:
    """A query, such as the signature of a folder, stays at the end."""
    place, mark, query = folder.partition("?") if is_remote(folder) else (folder, "", "")
    return f"{place.rstrip('/')}/{name}{mark}{query}"
