from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from svip.semantics.attributes import attribute_phrases
from svip.semantics.vectors import VectorsError, embed_attributes, read_embedding, read_words, write_embedding

GLOVE = "red 1 0 2\nwing 3 4 0\n, 9 9 9\nblue -1 0.5 1e-1\n"
SHARED = Path(os.environ.get("SVIP_SHARED", "../shared")) / "data"


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    return write(tmp_path, GLOVE)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "glove.3d.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("dataset", "name", "words"),
    [
        ("cub", "has_bill_shape::curved_(up_or_down)", "bill shape curved up down"),
        ("cub", "has_size::very_small_(3_-_5_in)", "size very small"),
        ("cub", "has_tail_shape::fan-shaped_tail", "tail shape fan shaped"),
        ("cub", "has_head_pattern::eyering", "head pattern eye ring"),
        ("cub", "has_bill_length::about_the_same_as_head", "bill length same head"),
        ("cub", "has_shape::duck-like", "shape duck"),
        ("awa2", "quadrapedal", "quadrupedal"),
        ("awa2", "oldworld", "old world"),
        ("awa2", "strainteeth", "strain teeth"),
        ("sun", "sailing/ boating", "sailing boating"),
        ("sun", "man-made", "man made"),
        ("sun", "no horizon", "no horizon"),
        ("sun", "wood (not part of a tree)", "wood"),
        ("synthetic", "has_wing_color::red", "wing color red"),
    ],
)
def test_names_become_words(dataset: str, name: str, words: str) -> None:
    assert attribute_phrases(dataset, [name]) == [words.split()]


def test_glued_words_are_parted_only_in_their_data_set() -> None:
    assert attribute_phrases("sun", ["longleg"]) == [["longleg"]]


def test_name_without_words_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("'12 (3)' of 'sun' has no words")):
        attribute_phrases("sun", ["red", "12 (3)"])


def test_mean_and_sum_of_words(glove: Path) -> None:
    phrases, names = [["red", "wing"], ["blue"]], ["red wing", "blue"]
    mean = embed_attributes(phrases, names, glove)
    assert mean.vectors.dtype == np.float32
    assert mean.vectors == pytest.approx(np.array([[2, 2, 1], [-1, 0.5, 0.1]]))
    total = embed_attributes(phrases, names, glove, "sum")
    assert total.vectors == pytest.approx(np.array([[4, 4, 2], [-1, 0.5, 0.1]]))
    assert mean.report["missing_words"] == {}


def test_unknown_words_are_reported_and_left_out_of_the_mean(glove: Path) -> None:
    embedding = embed_attributes([["wings", "red"]], ["a"], glove)
    assert embedding.vectors.tolist() == [[1, 0, 2]]
    assert embedding.report["attributes"] == [{"name": "a", "words": ["red"], "missing": ["wings"]}]
    assert embedding.report["missing_words"] == {"wings": ["wing"]}


def test_attribute_without_known_word_is_an_error_that_suggests(glove: Path) -> None:
    with pytest.raises(VectorsError, match="no word of attribute 'has_wings'.*'wings', nearest known: wing"):
        embed_attributes([["red"], ["wings"]], ["red", "has_wings"], glove)


def test_allowed_missing_attribute_is_zero_and_listed(glove: Path) -> None:
    embedding = embed_attributes([["red"], ["wings"]], ["red", "has_wings"], glove, allow_missing=True)
    assert embedding.vectors.tolist() == [[1, 0, 2], [0, 0, 0]]
    assert embedding.report["zero_attributes"] == ["has_wings"]


def test_file_that_knows_none_of_the_words_still_has_a_dimension(glove: Path) -> None:
    assert embed_attributes([["x"]], ["x"], glove, allow_missing=True).vectors.shape == (1, 3)


def test_header_of_word2vec_text_is_accepted(tmp_path: Path) -> None:
    known, common = read_words(write(tmp_path, "4 3\n" + GLOVE), {"red"})
    assert known["red"].tolist() == [1, 0, 2]
    assert common == ["red", "wing", ",", "blue"]


def test_tokens_with_spaces_are_not_taken_for_their_first_word(tmp_path: Path) -> None:
    known, _ = read_words(write(tmp_path, ", 0 0 0\nred cross 7 7 7\n" + GLOVE), {"red"})
    assert known["red"].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2 3\nred 1 2\n", "line 2: expected 3 numbers, found 2"),
        ("a 1 2 3\nred 1 2 3 4\n", "line 2: expected 3 numbers, found 4"),
        ("a 1 2 3\nb 1 2 3\nred 1 x 3\n", "line 3: expected 3 numbers .*'x'"),
        ("red 1 nan 3\n", "line 1: expected finite numbers"),
        ("red\n", "line 1: expected a word and its numbers"),
        ("", "holds no word vectors"),
        ("400000 50\n", "holds no word vectors"),
        (b"\x1f\x8b\x08\x00\x00", "is not text"),
        (b"3 2\nred \x00\x01\x02", "is not text"),
    ],
)
def test_broken_files_are_named_with_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(VectorsError, match=f"{re.escape(str(path))}.*{message}"):
        embed_attributes([["red"]], ["red"], path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VectorsError, match="none.txt: No such file.*semantics.vectors"):
        embed_attributes([["red"]], ["red"], tmp_path / "none.txt")


def test_what_is_written_is_read_back(glove: Path, tmp_path: Path) -> None:
    written = embed_attributes([["red"], ["blue", "rde"]], ["red", "blue"], glove)
    write_embedding(embed_attributes([["wing"]], ["old"], glove), tmp_path / "a" / "out")
    write_embedding(written, tmp_path / "a" / "out")
    back = read_embedding(tmp_path / "a" / "out")
    assert back.vectors.tolist() == written.vectors.tolist()
    assert (back.names, back.report) == (written.names, written.report)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "a" / "out").iterdir()) == [
        "attributes.txt",
        "report.json",
        "vectors.npy",
    ]


def test_other_folders_are_not_overwritten(glove: Path, tmp_path: Path) -> None:
    with pytest.raises(VectorsError, match="exists and holds no attribute vectors"):
        write_embedding(embed_attributes([["red"]], ["red"], glove), tmp_path)
    assert glove.exists()


def test_damaged_embeddings_are_refused(glove: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(VectorsError, match="holds no attribute vectors"):
        read_embedding(out)
    write_embedding(embed_attributes([["red"]], ["red"], glove), out)
    (out / "attributes.txt").write_text("red\nblue\n")
    with pytest.raises(VectorsError, match=r"expected float32 \[2, V\].*found float32 \[1, 3\]"):
        read_embedding(out)
    np.save(out / "vectors.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(VectorsError, match="holds no attribute vectors"):
        read_embedding(out)


def names_of(dataset: str) -> list[str]:
    if dataset == "cub":
        return [line.split(" ", 1)[1] for line in _lines("cub/attributes.txt")]
    if dataset == "awa2":
        return [line.split()[1] for line in _lines("awa2/Animals_with_Attributes2/predicates.txt")]
    return [line.strip().split(" ", 1)[1] for line in _lines("sun/attributes.txt")]


def _lines(path: str) -> list[str]:
    return [line for line in (SHARED / path).read_text().splitlines() if line.strip()]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data (set SVIP_SHARED)")
@pytest.mark.parametrize(("dataset", "count"), [("cub", 312), ("awa2", 85), ("sun", 102)])
def test_every_word_of_the_real_attributes_is_in_glove(dataset: str, count: int) -> None:
    names = names_of(dataset)
    phrases = attribute_phrases(dataset, names)
    assert len(names) == count
    assert len({frozenset(phrase) for phrase in phrases}) == count  # no two attributes become one
    embedding = embed_attributes(phrases, names, SHARED / "word_vectors" / "glove.6B.50d.subset.txt")
    assert embedding.vectors.shape == (count, 50)
    assert embedding.report["missing_words"] == {}
    assert np.linalg.norm(embedding.vectors, axis=1).min() > 0.5
