"""Archives that mean harm, or are broken, are refused without a trace; good ones are unpacked as they are."""

from __future__ import annotations

import gzip
import io
import os
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from svip.data.archives import extract
from svip.data.errors import DataError

Entry = tuple[str | tarfile.TarInfo | zipfile.ZipInfo, bytes]
GOOD: list[Entry] = [("set/images/a.jpg", b"photo a" * 999), ("set/images/b.jpg", b"photo b"), ("names.txt", b"a\nb\n")]


def tar(path: Path, *entries: Entry, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(str(name))
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return path


def zipped(path: Path, *entries: Entry) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            assert not isinstance(name, tarfile.TarInfo)
            archive.writestr(name, content)
    return path


def special(kind: bytes, name: str = "set/special", target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def zip_link(path: Path) -> Path:
    info = zipfile.ZipInfo("set/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped(path, (info, b"/etc/passwd"))


def cut(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    return path


def zeros(path: Path, gigabytes: int) -> Path:
    """A tar.gz of one file with so many GB of zeros, made by repeating one compressed megabyte of them."""
    info = tarfile.TarInfo("set/zeros.bin")
    info.size = gigabytes << 30
    with open(path, "wb") as file:
        file.write(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
        file.write(gzip.compress(bytes(1 << 24), 9) * (gigabytes << 6))
    return path


def zip_of_zeros(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("set/zeros.bin", "w") as member:
        for _ in range(100):
            member.write(bytes(1 << 20))
    return path


def encrypted(path: Path) -> Path:
    """The flag that says so, in the member's own header and in the directory."""
    content = bytearray(zipped(path, *GOOD).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    return path


def long_name_after_noise(path: Path) -> Path:
    """A name of 8 MB behind a member of noise, whose size alone would allow for it."""
    noise, name = tarfile.TarInfo("set/noise.bin"), tarfile.TarInfo("././@LongLink")
    noise.size, name.size, name.type = 4 << 20, 8 << 20, tarfile.GNUTYPE_LONGNAME
    with gzip.open(path, "wb", 1) as file:
        file.write(noise.tobuf(tarfile.GNU_FORMAT) + random.Random(0).randbytes(noise.size))
        file.write(name.tobuf(tarfile.GNU_FORMAT) + b"a" * name.size)
    return path


def lzma_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("set/a.txt", b"text" * 999)
    return path


def headers_too_long(path: Path) -> Path:
    """A pax header that claims 8 GB, which a reader may take into memory."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + gzip.compress(bytes(1 << 24), 9) * 20)
    return path


def tar_without_end(path: Path) -> Path:
    """Cut exactly between two members, where tarfile itself sees nothing wrong."""
    tar(path, *GOOD, mode="w")
    os.truncate(path, 512 + 7168)  # the first member: its header and 6,993 bytes in whole blocks
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "tar: ../x": (lambda p: tar(p, ("../x", b"")), "'../x' leads out"),
    "tar: a/../../x": (lambda p: tar(p, ("a/../../x", b"")), "leads out"),
    "tar: absolute path": (lambda p: tar(p, ("/tmp/x", b"")), "'/tmp/x' has an absolute path"),
    "tar: symbolic link": (lambda p: tar(p, special(tarfile.SYMTYPE, target="/etc")), "'set/special' is a link"),
    "tar: symbolic link, then a file through it": (
        lambda p: tar(p, special(tarfile.SYMTYPE, "out", ".."), ("out/x", b"")),
        "'out' is a link",
    ),
    "tar: hard link": (lambda p: tar(p, special(tarfile.LNKTYPE, target="/etc/passwd")), "is a link"),
    "tar: character device": (lambda p: tar(p, special(tarfile.CHRTYPE)), "neither a plain file"),
    "tar: block device": (lambda p: tar(p, special(tarfile.BLKTYPE)), "neither a plain file"),
    "tar: fifo": (lambda p: tar(p, special(tarfile.FIFOTYPE)), "neither a plain file"),
    "tar: 10 GB of zeros": (lambda p: zeros(p, 10), "far more than its size"),
    "tar: a header of 8 GB": (headers_too_long, "a header of more than 1,048,576 bytes"),
    "tar: a name of 8 MB": (long_name_after_noise, "a header of more than 1,048,576 bytes"),
    "tar: a name twice": (lambda p: tar(p, *GOOD, GOOD[1]), "'set/images/b.jpg' comes twice"),
    "tar: a file, then a folder of its name": (lambda p: tar(p, ("set", b""), *GOOD), "comes twice, or as file and"),
    "tar: backslashes": (lambda p: tar(p, ("..\\x", b"")), "backslash"),
    "tar: escape codes in a name": (lambda p: tar(p, ("\x1b[2Jx", b"")), "control character"),
    "tar: 10,000 folders deep": (lambda p: tar(p, ("a/" * 10_000 + "x", b"")), "too deep"),
    "tar: a name of 300 letters": (lambda p: tar(p, ("a" * 300, b"")), "too long a name"),
    "tar.gz: cut in the middle": (lambda p: cut(tar(p, *GOOD), 0.5), "not whole"),
    "tar.gz: cut 4 bytes before the end": (
        lambda p: cut(tar(p, *GOOD), 1 - 4 / tar(p, *GOOD).stat().st_size),
        "not whole",
    ),
    "tar: cut within a member": (lambda p: cut(tar(p, *GOOD, mode="w"), 0.2), "not whole|not a whole tar"),
    "tar: cut between members": (tar_without_end, "has no end"),
    "zip: ../x": (lambda p: zipped(p, ("../x", b"")), "leads out"),
    "zip: absolute path": (lambda p: zipped(p, ("/tmp/x", b"")), "absolute path"),
    "zip: drive letter": (lambda p: zipped(p, ("C:/x", b"")), "absolute path"),
    "zip: symbolic link": (zip_link, "'set/link' is a link"),
    "zip: NUL in a name": (
        lambda p: patched(zipped(p, ("set/a.jpg_/../x", b"")), b"a.jpg_", b"a.jpg\0"),
        "control character",
    ),
    "zip: 100 MB of zeros in 100 kB": (zip_of_zeros, "far more than its size"),
    "zip: encrypted": (encrypted, "'set/images/a.jpg' is encrypted"),
    "zip: LZMA": (lzma_zip, "'set/a.txt' is packed in an unusual way"),
    "zip: a name that is no UTF-8": (
        lambda p: patched(zipped(p, ("s\u00e9t.jpg", b"")), "s\u00e9t".encode(), b"s\xc3\x28t"),
        "not a whole tar, tar.gz or zip",
    ),
    "zip: wrong checksum": (
        lambda p: patched(zipped(p, *GOOD), struct.pack("<I", zlib.crc32(GOOD[1][1])), b"\1\2\3\4"),
        "Bad CRC",
    ),
    "zip: cut": (lambda p: cut(zipped(p, *GOOD), 0.9), "not a whole tar, tar.gz or zip"),
    "a web page": (lambda p: p.write_text("<html>moved</html>") and p or p, "not a whole tar, tar.gz or zip"),
    "nothing at all": (lambda p: p.write_bytes(b"") and p or p, "not a whole tar, tar.gz or zip"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_broken_archive_is_refused_without_a_trace(name: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[name]
    archive, into = make(tmp_path / "archive"), tmp_path / "into"
    into.mkdir()
    (into / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=reason) as refused:
        extract(archive, into)
    assert str(archive) in str(refused.value)
    assert [path.name for path in into.rglob("*")] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "into"]


def test_more_members_than_allowed_are_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "many.tar", *((f"{number}", b"") for number in range(11)))
    with pytest.raises(DataError, match="more than 10 members"):
        extract(archive, tmp_path, most_members=10)


def test_the_limit_counts_all_members_together(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tgz", *((f"{number}", bytes(1000)) for number in range(5)))
    assert len(extract(archive, tmp_path, most_bytes=5000)) == 5
    with pytest.raises(DataError, match="far more than its size, at member '4'"):
        extract(archive, tmp_path, most_bytes=4999)


@pytest.mark.parametrize("make", [tar, zipped, lambda path, *entries: tar(path, *entries, mode="w")])
def test_a_good_archive_is_unpacked_as_plain_files(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", *GOOD, ("set/images/._a.jpg", b"a Mac's"), ("__MACOSX/x", b"a Mac's"))
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/b.jpg").write_text("older")
    (tmp_path / "set/mine.txt").write_text("mine")
    assert extract(archive, tmp_path) == ["names.txt", "set"]
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {**dict(GOOD), "set/mine.txt": b"mine", "archive": archive.read_bytes()}


def test_modes_and_owners_of_the_archive_are_not_taken_over(tmp_path: Path) -> None:
    info = tarfile.TarInfo("run.sh")
    info.mode, info.uid = 0o6777, 12345
    extract(tar(tmp_path / "a.tgz", (info, b"")), tmp_path)
    state = (tmp_path / "run.sh").stat()
    assert not state.st_mode & (stat.S_ISUID | stat.S_ISGID | 0o111)
    assert state.st_uid == os.getuid()


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tgz", *GOOD)
    (tmp_path / ".a.tgz.unpacking/set").mkdir(parents=True)
    (tmp_path / ".a.tgz.unpacking/set/half.jpg").write_bytes(b"half")
    extract(archive, tmp_path)
    assert not (tmp_path / "set/half.jpg").exists()
