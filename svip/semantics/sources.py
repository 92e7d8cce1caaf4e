"""Where word vectors come from: any file that people have them in, by its path, its address or gensim-data's name."""

from __future__ import annotations

import difflib
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from gensim.models import KeyedVectors
from tqdm import tqdm

from svip.semantics.keyed_vectors import read_keyed_vectors
from svip.semantics.scan import COMMON, VectorsError, Words, scan

GENSIM_DATA = {
    "fasttext-wiki-news-subwords-300": "de2bb3a20c46ce65c9c131e1ad9a77af",
    "glove-twitter-25": "50db0211d7e7a2dcd362c6b774762793",
    "glove-twitter-50": "c168f18641f8c8a00fe30984c4799b2b",
    "glove-twitter-100": "b04f7bed38756d64cf55b58ce7e97b15",
    "glove-twitter-200": "e52e8392d1860b95d5308a525817d8f9",
    "glove-wiki-gigaword-50": "c289bc5d7f2f02c6dc9f2f9b67641813",
    "glove-wiki-gigaword-100": "40ec481866001177b8cd4cb0df92924f",
    "glove-wiki-gigaword-200": "59652db361b7a87ee73834a6c391dfc1",
    "glove-wiki-gigaword-300": "29e9329ac2241937d55b852e8284e89b",
    "word2vec-google-news-300": "a5e5354d40acb95f9ec66d5977d140ef",
}
"""The English word vectors of gensim-data, with the MD5 that its list.json publishes of each NAME.gz."""
RELEASES = "https://github.com/RaRe-Technologies/gensim-data/releases/download"

BUFFER = 1 << 20
UNPACKED_FREE, UNPACKED_TIMES = 100 << 20, 50
"""A packed file may unpack to so many bytes, and to so many times its own size: text and numbers reach a tenth."""


class Readable(Protocol):
    """What unpacks a file."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class Vocabulary(NamedTuple):
    """What was found of the wanted words."""

    known: KeyedVectors
    """The wanted words that there are, with their vectors."""
    common: list[str]
    """The source's commonest words, to suggest from."""
    name: str
    """The source as messages and reports may name it: without what an address may hold of secrets."""


def read_words(source: KeyedVectors | Path | str, wanted: Set[str]) -> Vocabulary:
    """The vectors of the wanted words that ``source`` has, and its commonest words, in one scan.

    source: KeyedVectors in memory; or the path or address (http, https, s3) of a file: text of GloVe or word2vec,
    word2vec's binary form, each also in a .gz or .zip (FILE.zip::MEMBER where it holds several), or what gensim's
    KeyedVectors.save wrote; or a name of gensim-data. What a file holds is recognised by its content. VectorsError
    names the file and what is wrong with it.
    """
    if isinstance(source, KeyedVectors):
        found = Words(source.vector_size, {word: source[word] for word in wanted if word in source})
        found.common = [str(word) for word in source.index_to_key[:COMMON]]
        name = "the KeyedVectors in memory"
    else:
        path, member = _locate(str(source))
        name = f"{path}::{member}" if member else str(path)
        with _open(path, member) as file:
            if file.peek(2)[:1] == b"\x80":  # every pickle since protocol 2
                found = read_keyed_vectors(file, name, path, wanted)
            else:
                found = scan(file, name, wanted)
    known = KeyedVectors(found.dimension, count=0, dtype=np.float32)
    if found.rows:
        known.add_vectors(list(found.rows), np.stack(list(found.rows.values())))
    return Vocabulary(known, found.common, name)


def _locate(source: str) -> tuple[Path, str]:
    """The file on this machine, downloaded if need be, and the member of a zip that is meant ("": its only one)."""
    address, _, member = source.rpartition("::")
    if ".zip" not in address:  # no "::" at all, or that of an address such as http://[::1]/
        address, member = source, ""
    if address.startswith(("http://", "https://", "s3://")):
        from svip.data.transfer import local_copy  # here, for boto3 is of no use to a file

        return local_copy(address), member
    path = Path(address).expanduser()
    # gensim's own downloader runs Python that it downloads with the vectors; only its folder and its files are used
    cached = Path(os.environ.get("GENSIM_DATA_DIR") or Path.home() / "gensim-data") / address / f"{address}.gz"
    if path.exists():
        return path, member
    if path.name == address and cached.is_file():
        return cached, member
    if address in GENSIM_DATA:
        return _download_from_gensim_data(address), member
    close = difflib.get_close_matches(address, GENSIM_DATA, n=1)
    hint = f"did you mean gensim-data's {close[0]}?" if close else "check semantics.vectors"
    raise VectorsError(f"can't read word vectors {address}: No such file, nor a name of gensim-data; {hint}")


def _download_from_gensim_data(name: str) -> Path:
    from svip.data.transfer import Expected, cache_folder, download

    target = cache_folder() / "gensim-data" / f"{name}.gz"
    download([f"{RELEASES}/{name}/{name}.gz"], target, Expected(md5=GENSIM_DATA[name]))
    return target


@contextmanager
def _open(path: Path, member: str) -> Iterator[io.BufferedReader]:
    """The content of a file, unpacked as it is read: nothing of it is written anywhere."""
    if not path.is_file():
        raise VectorsError(f"can't read word vectors {path}: expected a file, found a folder or a device")
    size = path.stat().st_size
    try:
        with ExitStack() as stack:
            packed = stack.enter_context(open(path, "rb", buffering=0))
            magic = packed.read(4)
            packed.seek(0)
            inner: Readable = packed
            if magic[:2] == b"\x1f\x8b":
                inner = stack.enter_context(gzip.GzipFile(fileobj=packed))
            elif magic == b"PK\x03\x04":
                inner = _open_member(stack.enter_context(ZipFile(packed)), str(path), member)
            elif member:
                raise VectorsError(f"{path} is no zip archive; name the file alone, without ::{member}")
            bar = stack.enter_context(
                tqdm(desc=path.name, total=size, unit="B", unit_scale=True, delay=1, leave=False, disable=None)
            )
            unpacked = _Unpacked(inner, packed, str(path), UNPACKED_FREE + UNPACKED_TIMES * size, bar)
            yield io.BufferedReader(unpacked, BUFFER)
    except (OSError, EOFError, zlib.error, BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise VectorsError(f"can't read word vectors {path}: {error}; is the file whole?") from error


def _open_member(archive: ZipFile, name: str, member: str) -> Readable:
    members = {item.filename: item for item in archive.infolist() if not item.is_dir()}
    shown = ", ".join(list(members)[:10]) + (", ..." if len(members) > 10 else "")
    if member not in members and (member or len(members) != 1):
        raise VectorsError(
            f"{name} holds {len(members)} files; name one as {name}::MEMBER. There are: {shown or 'none'}"
        )
    item = members[member] if member else next(iter(members.values()))
    if item.flag_bits & 1 or item.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise VectorsError(f"{name}::{item.filename} is encrypted or packed in a rare way; unpack it yourself")
    return cast(Readable, archive.open(item))


class _Unpacked(io.RawIOBase):
    """Unpacked bytes, counted against bombs; the bar shows how far the packed file was read."""

    def __init__(self, inner: Readable, packed: io.FileIO, name: str, limit: int, bar: tqdm) -> None:
        self._inner, self._packed, self._name, self._limit, self._bar = inner, packed, name, limit, bar
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as there is something left: what peek shows is then as long as it can be."""
        view, filled = memoryview(buffer), 0
        while filled < len(view) and (got := self._inner.readinto(view[filled:])):
            filled += got
        self._count += filled
        if self._count > self._limit:
            raise VectorsError(f"{self._name} unpacks to more than {self._limit:,} bytes; expected word vectors")
        self._bar.update(self._packed.tell() - self._bar.n)
        return filled
