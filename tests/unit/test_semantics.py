from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from gensim.models import KeyedVectors

from svip.data.errors import DataError
from svip.semantics.attributes import Rules, attribute_phrases, read_rules, shipped_rules
from svip.semantics.scan import VectorsError
from svip.semantics.vectors import embed_attributes, read_embedding, write_embedding

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
        ("apy", "2D Boxy", "two dimensional boxy"),
        ("apy", "Horiz Cyl", "horizontal cylinder"),
        ("apy", "Row Wind", "row windows"),
        ("apy", "Furn. Leg", "furniture leg"),
        ("apy", "Stem/Trunk", "stem trunk"),
        ("synthetic", "has_wing_color::red", "wing color red"),
    ],
)
def test_names_become_words(dataset: str, name: str, words: str) -> None:
    assert attribute_phrases([name], shipped_rules(dataset)) == [words.split()]


def test_glued_words_are_parted_only_in_their_data_set() -> None:
    assert attribute_phrases(["longleg"], shipped_rules("sun")) == [["longleg"]]


def test_name_without_words_is_named() -> None:
    with pytest.raises(DataError, match=re.escape("'12 (3)' has no words; give it a phrase")):
        attribute_phrases(["red", "12 (3)"], Rules())


def test_own_rules_replace_names_first_and_then_words(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("names:\n  12 (3): Dozen redwing\nwords:\n  redwing: red wing\n")
    assert attribute_phrases(["12 (3)", "Redwing 5"], read_rules(path)) == [["dozen", "red", "wing"], ["red", "wing"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words:\n  no: none\n", "in words found False: 'none', which may lack quotes"),
        ("words:\n  twelve: 12\n", "in words found 'twelve': 12"),
        ("word:\n  a: b\n", "expected the mappings names and words"),
        ("words: [a, b]\n", "found list as words"),
        ("just text", "expected the mappings names and words"),
        ("words: {", "expected the mappings"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_rules_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
        read_rules(path)


def test_rules_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml.*No such file"):
        read_rules(tmp_path / "none.yaml")


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


def test_keyed_vectors_in_memory_are_taken(glove: Path) -> None:
    vectors = KeyedVectors.load_word2vec_format(str(glove), no_header=True)
    embedding = embed_attributes([["red", "wings"], ["blue"]], ["a", "b"], vectors)
    assert embedding.vectors == pytest.approx(np.array([[1, 0, 2], [-1, 0.5, 0.1]]))
    assert embedding.report["missing_words"] == {"wings": ["wing"]}
    assert embedding.report["vectors_file"] == "the KeyedVectors in memory"


def test_what_is_written_is_read_back(glove: Path, tmp_path: Path) -> None:
    written = embed_attributes([["red"], ["blue", "rde"]], ["red", "blue"], glove)
    for _ in range(2):  # the second time over the first
        write_embedding(written, tmp_path / "a" / "out")
    with pytest.raises(VectorsError, match=r"out holds other attribute vectors \(2 from glove\S*, pooling mean\)"):
        write_embedding(embed_attributes([["wing"]], ["other"], glove), tmp_path / "a" / "out")
    back = read_embedding(tmp_path / "a" / "out")
    assert back.vectors.tolist() == written.vectors.tolist()
    assert (back.names, back.report) == (written.names, written.report)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "a" / "out").iterdir()) == [
        "attributes.txt",
        "report.json",
        "report.md",
        "vectors.npy",
    ]


def test_the_written_report_lists_words_without_a_vector_and_what_is_like_them(glove: Path, tmp_path: Path) -> None:
    names = ["red", "has_wings"]
    write_embedding(embed_attributes([["red"], ["wings"]], names, glove, allow_missing=True), tmp_path / "some")
    text = (tmp_path / "some" / "report.md").read_text()
    assert text.startswith("# 2 attribute vectors of size 3\n")
    assert "| wings | wing |\n" in text
    assert "No word of these attributes has one, so that their vectors are zero: has_wings." in text
    write_embedding(embed_attributes([["red"]], ["red"], glove), tmp_path / "all")
    assert "Every word has a vector." in (tmp_path / "all" / "report.md").read_text()


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
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}; set SVIP_SHARED")
@pytest.mark.parametrize(("dataset", "attributes", "words"), [("cub", 312, 100), ("awa2", 85, 89), ("sun", 102, 135)])
@pytest.mark.parametrize("dimension", [50, 100])
def test_every_word_of_the_real_attributes_is_in_glove(
    dataset: str, attributes: int, words: int, dimension: int
) -> None:
    names = names_of(dataset)
    phrases = attribute_phrases(names, shipped_rules(dataset))
    assert len(names) == attributes
    assert len({frozenset(phrase) for phrase in phrases}) == attributes  # no two attributes become one
    embedding = embed_attributes(phrases, names, SHARED / "word_vectors" / f"glove.6B.{dimension}d.subset.txt")
    assert embedding.vectors.shape == (attributes, dimension)
    assert embedding.report["missing_words"] == {}
    assert len({word for item in embedding.report["attributes"] for word in item["words"]}) == words
    assert np.linalg.norm(embedding.vectors, axis=1).min() > 0.5


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}; set SVIP_SHARED")
def test_without_rules_glued_words_of_awa2_are_reported_with_suggestions() -> None:
    names = names_of("awa2")
    file = SHARED / "word_vectors" / "glove.6B.50d.subset.txt"
    report = embed_attributes(attribute_phrases(names, Rules()), names, file, allow_missing=True).report
    shipped = shipped_rules("awa2").words
    assert report["missing_words"].keys() == shipped.keys() - {"flys", "longneck"}  # GloVe has these two, as names
    assert {word: found[0] for word, found in report["missing_words"].items()}.items() <= shipped.items()
