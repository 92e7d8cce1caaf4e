"""Every form of word vectors that people have is read, by its content; every broken or hostile one is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from gensim.models import FastText, KeyedVectors, Word2Vec

from svip.data.errors import DataError
from svip.semantics import sources
from svip.semantics.scan import VectorsError
from svip.semantics.sources import read_words

WORDS = ["the", "red", "wing", ",", "blue"]
ROWS = np.array([[0, 0, 1], [1, 0, 2], [3, 4, 0], [9, 9, 9], [-1, 0.5, 0.25]], np.float32)
GLOVE = "".join(
    f"{word} {' '.join(f'{value:g}' for value in row)}\n" for word, row in zip(WORDS, ROWS, strict=True)
).encode()
BINARY = b"5 3\n" + b"".join(f"{word} ".encode() + row.tobytes() for word, row in zip(WORDS, ROWS, strict=True))


def vectors() -> KeyedVectors:
    known = KeyedVectors(3)
    known.add_vectors(WORDS, ROWS)
    return known


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def put(folder: Path, content: bytes, name: str = "vectors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def assert_read(source: Path | str) -> None:
    known, common, _ = read_words(source, {"red", "blue", "green"})
    assert sorted(known.index_to_key) == ["blue", "red"]
    assert known["red"].tolist() == [1, 0, 2]
    assert known["blue"].tolist() == [-1, 0.5, 0.25]
    assert known.vectors.dtype == np.float32
    assert common == WORDS


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(GLOVE, id="GloVe text"),
        pytest.param(GLOVE.rstrip(b"\n"), id="GloVe text without a last new line"),
        pytest.param(GLOVE.replace(b"\n", b"\r\n"), id="GloVe text with CR LF"),
        pytest.param(GLOVE.replace(b"\n", b" \n"), id="fastText's text, with spaces at the ends of lines"),
        pytest.param(b"5 3\n" + GLOVE, id="word2vec text"),
        pytest.param(BINARY, id="word2vec binary"),
        pytest.param(re.sub(rb"(?=red|wing|,|blue)", b"\n", BINARY), id="word2vec binary with new lines"),
        pytest.param(pickle.dumps(vectors(), 4), id="gensim KeyedVectors"),
        pytest.param(pickle.dumps(vectors(), 5), id="gensim KeyedVectors, pickle protocol 5"),
    ],
)
@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, lambda content: zipped({"folder/a": content})], ids=["plain", "gz", "zip"]
)
def test_each_form_is_read_plain_and_packed_whatever_its_name(
    content: bytes, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    assert_read(put(tmp_path, pack(content)))


def test_forms_that_gensim_writes_itself(tmp_path: Path) -> None:
    vectors().save_word2vec_format(str(tmp_path / "text"))
    vectors().save_word2vec_format(str(tmp_path / "binary"), binary=True)
    vectors().save(str(tmp_path / "small.kv"))
    vectors().save(str(tmp_path / "large.kv"), separately=["vectors"])
    with_norms = vectors()
    with_norms.fill_norms()
    with_norms.set_vecattr("red", "count", 7)
    with_norms.add_lifecycle_event("made")
    with_norms.save(str(tmp_path / "attributes.kv"), sep_limit=0)
    for name in ("text", "binary", "small.kv", "large.kv", "attributes.kv"):
        assert_read(tmp_path / name)


@pytest.mark.parametrize("in_one_file_up_to", [1000, 0])
def test_trained_model_of_gensim(in_one_file_up_to: int, tmp_path: Path) -> None:
    model = Word2Vec([["red", "wing"], ["blue", "wing"]], vector_size=8, min_count=1, epochs=1)
    model.save(str(tmp_path / "word2vec.model"), sep_limit=in_one_file_up_to)
    assert (tmp_path / "word2vec.model.wv.vectors.npy").exists() == (in_one_file_up_to == 0)
    known, common, _ = read_words(tmp_path / "word2vec.model", {"red", "wing"})
    assert known["red"].tolist() == model.wv["red"].tolist()
    assert common == model.wv.index_to_key


def test_file_of_gensim_3(tmp_path: Path) -> None:
    state = {"vector_size": 3, "index2word": WORDS, "vectors": ROWS, "vocab": {}, "vectors_norm": None}
    content = hostile("gensim.models.keyedvectors", "Word2VecKeyedVectors", (), state)
    assert_read(put(tmp_path, content))


def test_rows_behind_the_first_block_are_found_in_text_and_binary(tmp_path: Path) -> None:
    count, size = 2_000, 300
    rows = np.random.default_rng(0).normal(size=(count, size)).astype(np.float32).round(4)
    many = KeyedVectors(size)
    many.add_vectors([f"w{index}" for index in range(count)], rows)
    many.save_word2vec_format(str(tmp_path / "text"))
    many.save_word2vec_format(str(tmp_path / "binary"), binary=True)
    wanted = {"w0", "w871", "w872", "w1500", f"w{count - 1}"}
    for name in ("text", "binary"):
        known, common, _ = read_words(tmp_path / name, wanted)
        assert set(known.index_to_key) == wanted
        assert all(known[word].tolist() == many[word].tolist() for word in wanted), name
        assert common == many.index_to_key


def test_tokens_with_spaces_are_not_taken_for_their_first_word(tmp_path: Path) -> None:
    first = b". . . 5 5 5\nred cross 7 7 7\nred name@domain.com 8 8 8\n"
    known, common, _ = read_words(put(tmp_path, first + GLOVE), {"red"})
    assert known.vector_size == 3
    assert known["red"].tolist() == [1, 0, 2]
    assert common[-5:] == WORDS


def test_tabs_part_a_token_from_its_numbers(tmp_path: Path) -> None:
    known, common, _ = read_words(put(tmp_path, b"red wing\t5 6 7\n" + GLOVE.replace(b" ", b"\t")), {"red", "red wing"})
    assert (known["red"].tolist(), known["red wing"].tolist()) == ([1, 0, 2], [5, 6, 7])
    assert common == ["red wing", *WORDS]


def test_tokens_that_are_numbers_or_no_utf_8_do_no_harm(tmp_path: Path) -> None:
    known, common, _ = read_words(put(tmp_path, b"7 7 7 7\n\xff\xfe 1 2 3\n\xc2\xa0 1 2 3\n" + GLOVE), {"red"})
    assert known["red"].tolist() == [1, 0, 2]
    assert common[:3] == ["7", "\ufffd\ufffd", "\xa0"]


def test_first_of_equal_words_counts(tmp_path: Path) -> None:
    known, _, _ = read_words(put(tmp_path, GLOVE + b"red 5 5 5\n"), {"red"})
    assert known["red"].tolist() == [1, 0, 2]


def test_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = put(tmp_path, zipped({"glove.2d.txt": b"red 1 1\n", "glove.3d.txt": GLOVE, "folder/": b""}), "glove.zip")
    with pytest.raises(VectorsError, match=r"holds 2 files; name one as .*glove.zip::MEMBER.*glove.2d.txt, glove.3d.t"):
        read_words(path, {"red"})
    with pytest.raises(VectorsError, match="There are: glove.2d.txt, glove.3d.txt"):
        read_words(f"{path}::glove.4d.txt", {"red"})
    assert_read(f"{path}::glove.3d.txt")
    assert read_words(f"{path}::glove.3d.txt", set()).name == f"{path}::glove.3d.txt"
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is unpacked


def test_gensim_data_is_found_in_gensim_s_folder_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENSIM_DATA_DIR", str(tmp_path))
    (tmp_path / "own-3").mkdir()
    put(tmp_path / "own-3", gzip.compress(b"5 3\n" + GLOVE), "own-3.gz")
    assert_read("own-3")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which it is served; downloads go to a cache of the test's own."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("SVIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GENSIM_DATA_DIR", str(tmp_path / "gensim-data"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_address_is_downloaded_and_kept(served: tuple[Path, str]) -> None:
    folder, address = served
    put(folder, zipped({"glove.3d.txt": GLOVE, "other": b""}), "glove.zip")
    assert_read(f"{address}/glove.zip::glove.3d.txt")
    name = read_words(f"{address}/glove.zip?signature=secret::glove.3d.txt", set()).name
    assert name.endswith("glove.zip::glove.3d.txt")
    assert "secret" not in name


def test_gensim_data_is_downloaded_checked_and_then_needs_no_network(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    content = gzip.compress(b"5 3\n" + GLOVE)
    monkeypatch.setattr(sources, "RELEASES", address)
    monkeypatch.setitem(sources.GENSIM_DATA, "good-3", hashlib.md5(content).hexdigest())
    monkeypatch.setitem(sources.GENSIM_DATA, "other-3", hashlib.md5(b"other").hexdigest())
    for name in ("good-3", "other-3"):
        (folder / name).mkdir()
        put(folder / name, content, f"{name}.gz")
    assert_read("good-3")
    (folder / "good-3" / "good-3.gz").unlink()
    assert_read("good-3")
    with pytest.raises(DataError, match=r"other-3\.gz.*md5"):
        read_words("other-3", {"red"})


def hostile(module: str, name: str, arguments: Sequence[Any], state: Any = None) -> bytes:
    """A pickle that calls module.name, made without importing it."""

    class Called:
        def __reduce__(self) -> tuple[Any, ...]:
            return placeholder, tuple(arguments), state

    content = pickle.dumps(Called(), 2)
    ours = b"c" + placeholder.__module__.encode() + b"\n" + placeholder.__qualname__.encode() + b"\n"
    assert ours in content
    return content.replace(ours, f"c{module}\n{name}\n".encode())


def placeholder(*arguments: object) -> dict[str, object]:
    raise AssertionError(f"called with {arguments}")


def keyed_vectors(array: Any, words: object = WORDS) -> bytes:
    """A KeyedVectors file with anything as its vectors and words."""
    known = vectors()
    known.vectors, known.index_to_key = array, words
    return pickle.dumps(known, 4)


def encrypted() -> bytes:
    content = bytearray(zipped({"a": GLOVE}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


LONG_TABLE = b"\x80\x02}r" + struct.pack("<I", 0x7FFFFFFF) + b"."
"""Ten bytes for which C's unpickler makes a table of 32 GB."""
BROKEN = {
    "empty file": (b"", "is empty"),
    "text with a short row": (b"a 1 2 3\nred 1 2\nb 1 2 3\n", "line 2: expected 3 numbers, found 2"),
    "text with a long row": (b"a 1 2 3\nb 1 2 3\nred 1 2 3 4\n", "line 3: expected 3 numbers, found 4"),
    "text with a word for a number": (b"a 1 2 3\nb 1 2 3\nred 1 x 3\n", "line 3: expected 3 numbers .*'x'"),
    "text cut in its last row": (GLOVE + b"bird 1 2", "line 6: expected a word and 3 numbers, found 2"),
    "text with NaN": (b"red 1 nan 3\n", "line 1: expected finite numbers"),
    "text with infinity": (b"red 1 1e999 3\n", "line 1: expected finite numbers"),
    "text without numbers": (b"red\nblue\n", "no numbers on its first lines"),
    "prose": (b"All happy families are alike\n" * 9, "no numbers on its first lines"),
    "text of one endless line": (b"red 1 2 3\n" + b"1 " * (1 << 20), "line 2 is longer than"),
    "UTF-16": (GLOVE.decode().encode("utf-16"), "neither text nor"),
    "header that announces more words, text": (b"6 3\n" + GLOVE, "announces 6 words, found 5"),
    "header that announces fewer words, text": (b"4 3\n" + GLOVE, "announces 4 words, found 5"),
    "header that announces other numbers, text": (b"5 2\n" + GLOVE, "announces 2 numbers a word, its lines have 3"),
    "header and nothing else": (b"400000 50\n", "no numbers on its first lines"),
    "header without words": (b"0 3\n" + BINARY[4:], "begins with 0 words of 3 numbers"),
    "header without numbers": (b"5 0\n" + BINARY[4:], "begins with 5 words of 0 numbers"),
    "header of huge numbers": (b"5 99999999999\n" + BINARY[4:], "begins with 5 words of 99999999999"),
    "header that announces more words, binary": (b"6" + BINARY[1:], "announces 6 words of 3 numbers, found only 5"),
    "header that announces fewer words, binary": (b"4" + BINARY[1:], "announces 4 words of 3 numbers, found more"),
    "binary cut in a vector": (BINARY[:-1], "announces 5 words of 3 numbers, found only 4"),
    "binary cut in a word": (BINARY[:-14], "announces 5 words of 3 numbers, found only 4"),
    "binary with NaN": (BINARY[:-12] + np.full(3, np.nan, "f4").tobytes(), "word 'blue': expected finite"),
    "binary without a space": (b"5 3\n" + b"\0" * (3 << 20), "found only 0"),
    "gz that is cut": (gzip.compress(GLOVE * 99)[:-9], "ended before the end-of-stream"),
    "gz with a wrong byte": (gzip.compress(GLOVE)[:-6] + b"......", "CRC check failed"),
    "gz bomb of zeros": (gzip.compress(b"\0" * (1 << 22)), "unpacks to more than"),
    "gz bomb of rows": (gzip.compress(GLOVE * (1 << 17), 1), "unpacks to more than"),
    "zip that is cut": (zipped({"a": GLOVE})[:-9], "is not a zip file"),
    "zip without a file": (zipped({"a/": b""}), "holds 0 files"),
    "encrypted zip": (encrypted(), "is encrypted"),
    "zip of a later version": (
        zipped({"a": GLOVE}).replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff"),
        "version 25.5",
    ),
    "zip bomb of rows": (zipped({"a": GLOVE * (1 << 17)}), "unpacks to more than"),
    "numpy file": (b"\x93NUMPY\x01\0" + b" " * 99, "neither text nor"),
    "pickle that calls os.system": (hostile("os", "system", ["touch {}"]), "would have run 'os.system'"),
    "pickle that calls posix.system": (hostile("posix", "system", ["touch {}"]), "would have run 'posix.system'"),
    "pickle that calls eval": (hostile("builtins", "eval", ["open('{}', 'w')"]), "would have run 'builtins.eval'"),
    "pickle that calls getattr": (hostile("builtins", "getattr", [1, "real"]), "would have run 'builtins.getattr'"),
    "pickle of another class": (hostile("subprocess", "Popen", [["touch", "{}"]]), "would have run 'subprocess.Popen'"),
    "pickle of an attribute of an admitted class": (
        b"\x80\x04\x8c\x1agensim.models.keyedvectors\x8c\x11KeyedVectors.load\x93.",
        "would have run 'gensim.models.keyedvectors.KeyedVectors.load'",
    ),
    "pickle of a registered extension": (b"\x80\x02\x82\x01.", "unregistered extension code 1"),
    "pickle of a huge table": (LONG_TABLE, "expected what its save"),
    "pickle of huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", "Nothing of it was run"),
    "pickle of a huge bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".", "Nothing of it was run"),
    "pickle that is cut": (pickle.dumps(vectors(), 4)[:-9], "Nothing of it was run"),
    "pickle of a plain dictionary": (pickle.dumps({"vectors": [1]}), "expected what its save"),
    "pickle of a FastText": (
        pickle.dumps(FastText([["red"]], vector_size=3, min_count=1, bucket=2, epochs=1).wv, 4),
        "would have run 'gensim.models.fasttext.FastTextKeyedVectors'",
    ),
    "KeyedVectors of objects": (keyed_vectors(np.array([[{}]], object)), "expected an array of floats.*'O8'"),
    "KeyedVectors of whole numbers": (keyed_vectors(np.ones((5, 3), np.int64)), "expected an array of floats.*'i8'"),
    "KeyedVectors of another shape": (keyed_vectors(ROWS[:4]), r"expected vectors of floats \[5, V\].*\[4, 3\]"),
    "KeyedVectors without an array": (keyed_vectors([1.0]), "expected an array of floats"),
    "KeyedVectors with NaN": (keyed_vectors(ROWS * np.nan), "word 'red': expected finite"),
    "KeyedVectors without words": (keyed_vectors(ROWS, None), "expected the list of its words"),
    "KeyedVectors whose words are numbers": (keyed_vectors(ROWS, [1, 2, 3, 4, 5]), "expected the list of its words"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = BROKEN[name]
    monkeypatch.setattr(sources, "UNPACKED_FREE", 1 << 16)
    monkeypatch.chdir(tmp_path)  # a command that is run leaves a file here
    path = put(tmp_path, content)
    with pytest.raises(VectorsError, match=f"{re.escape(str(path))}.*{message}"):
        read_words(path, {"red", "blue", "green"})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


def test_separate_vectors_that_are_missing_or_of_other_content_are_named(tmp_path: Path) -> None:
    path, separate = tmp_path / "a.kv", tmp_path / "a.kv.vectors.npy"
    vectors().save(str(path), separately=["vectors"])
    for array, message in [
        (ROWS[:4], r"expected vectors of floats \[5, V\] for its words, found float32 \[4, 3\]"),
        (np.ones((5, 3), np.int32), "found int32"),
        (np.asfortranarray(ROWS), "expected the rows of its array one after another"),
        (np.full((5, 3), np.inf, np.float32), "word 'red': expected finite"),
        (np.full((5, 3), {}, object), "a.kv.vectors.npy holds no vectors.*Python objects"),
    ]:
        np.save(separate, array, allow_pickle=True)
        with pytest.raises(VectorsError, match=message):
            read_words(path, {"red"})
    separate.write_bytes(separate.read_bytes()[:60])
    with pytest.raises(VectorsError, match="a.kv.vectors.npy holds no vectors"):
        read_words(path, {"red"})
    np.save(separate, ROWS)
    separate.write_bytes(separate.read_bytes().replace(b"(5, 3)", b"(5, 3("))  # numpy's tokenizer fails on its own way
    with pytest.raises(VectorsError, match="a.kv.vectors.npy holds no vectors"):
        read_words(path, {"red"})
    separate.unlink()
    with pytest.raises(VectorsError, match="keeps its vectors in .*a.kv.vectors.npy, which does not exist"):
        read_words(path, {"red"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (".", "expected a file, found a folder or a device"),
        ("/dev/zero", "expected a file, found a folder or a device"),
        ("none.txt", "none.txt: No such file.*semantics.vectors"),
        ("glove-wiki-gigaword-30", "No such file, nor a name of gensim-data; did you mean .*glove-wiki-gigaword-300"),
        ("text::member", "No such file"),
        ("ftp://host/glove.txt", "No such file"),
        ("text.zip::member", "is no zip archive; name the file alone"),
    ],
)
def test_what_is_no_file_is_refused(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, GLOVE, "text.zip")
    with pytest.raises(VectorsError, match=message):
        read_words(source, {"red"})


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(VectorsError, match="found a folder or a device"):
        read_words(tmp_path / "fifo", {"red"})


def test_member_that_would_leave_the_folder_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert_read(put(tmp_path / "a", zipped({"../../outside.txt": GLOVE})))
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "vectors"]
