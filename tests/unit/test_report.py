"""The report page and its table: numbers as measured, oracle labelled, names escaped, nothing requested."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from svip.evaluation import figures
from svip.evaluation.report import Example, markdown_table, write_report

NASTY = '<script>alert("x")</script> & $Co|'
ORACLE = "oracle: gamma chosen on the test set, not a result"
METRICS: dict[str, Any] = {
    "protocols": {
        "oracle": {"T1": 74.31, "U": 61.26, "S": 63.94, "H": 62.57, "gamma": 0.8134},
        "validation": {"T1": 74.31, "U": 58.02, "S": 66.47, "H": 61.96, "gamma": 0.7261},
        "none": {"T1": 74.31, "U": 21.58, "S": 78.83, "H": 33.88, "gamma": 0.0},
    },
    "comparators": {
        "eszsl": {
            **{"T1": 61.17, "U": 40.44, "S": 49.09, "H": 44.35, "gamma": 0.1523},
            "protocols": {
                "validation": {"T1": 61.17, "U": 40.44, "S": 49.09, "H": 44.35, "gamma": 0.1523},
                "none": {"T1": 61.17, "U": 14.72, "S": 56.63, "H": 23.37, "gamma": 0.0},
                "oracle": {"T1": 61.17, "U": 43.86, "S": 46.28, "H": 45.04, "gamma": 0.1776},
            },
        }
    },
    "chance": {"T1": 3.333, "U": 1.064, "S": 1.064},
    "ausuc": 0.4876,
    "counts": {
        "images": {"train": 2405, "val_seen": 300, "val_unseen": 702, "test_seen": 300, "test_unseen": 1397},
        "classes": {"train": 44, "val_unseen": 20, "test_unseen": 30},
    },
    "patch_selection": {
        "object_recall": 91.37,
        "random_recall": 81.64,
        "object_precision": 48.23,
        "random_precision": 43.05,
    },
    "settings": {"data": {"dataset": "cub", "split": "development", "fold": 1}, "model.selected_groups": 40},
}
LINEAGE = {
    "git sha": "3f1c0a9d",
    "bundle sha256": "9b1d" * 16,
    "preset": "paper/cub",
    "seed": "0",
    "device": "cpu",
    "minutes": "47",
    "changed overrides": "optim.lr=1e-5 data.split=development",
}
HISTORY = [
    {
        "phase": phase,
        "epoch": epoch,
        "train/loss": 3.1 * 0.93**epoch + lower,
        "train/loss_cls": 2.4 * 0.92**epoch + lower,
        "train/loss_consistency": 0.21 * 0.85**epoch,
        "train/loss_patch": 0.62 * 0.97**epoch,
        "val/T1": 72 - 40 * 0.8**epoch if phase == "select" else None,
        "val/U": 55 - 45 * 0.8**epoch if phase == "select" else None,
        "val/S": 68 - 30 * 0.75**epoch if phase == "select" else None,
        "val/H": 61 - 41 * 0.8**epoch - 0.08 * max(0, epoch - 12) ** 2 if phase == "select" else None,
        "seconds": 51.0,
    }
    for phase, epochs, lower in (("select", 20, 0.0), ("final", 16, 0.12))
    for epoch in range(epochs)
]


def class_table(seen: int, unseen: int) -> pd.DataFrame:
    random = np.random.default_rng(1)
    gzsl = np.sort(np.clip(random.normal(60, 22, seen + unseen), 0, 100))
    roles = np.array(["seen"] * seen + ["unseen"] * unseen)
    words = ("Black_footed_Albatross", "Least_Auklet", "Red_winged_Blackbird", "Brewer_Sparrow", "Artic_Tern")
    names = [f"{index + 1:03d}.{words[index % 5]}" for index in range(seen + unseen)]
    random.shuffle(roles)
    zsl = np.where(roles == "unseen", np.clip(gzsl + 12, 0, 100), np.nan)
    images = random.integers(41, 61, len(roles))
    return pd.DataFrame({"class": names, "role": roles, "images": images, "accuracy_zsl": zsl, "accuracy_gzsl": gzsl})


def seen_unseen(points: int = 5000) -> pd.DataFrame:
    angle = np.linspace(0, np.pi / 2, points)
    return pd.DataFrame(
        {"gamma": np.linspace(-2, 4, points), "seen": 79 * np.cos(angle) ** 0.7, "unseen": 74.31 * np.sin(angle) ** 0.7}
    )


def example(name: str = "023.Brandt_Cormorant", size: int = 224, groups: int = 7) -> Example:
    y, x = np.mgrid[0:size, 0:size] / size
    bird = ((x - 0.5) / 0.32) ** 2 + ((y - 0.5) / 0.22) ** 2 < 1
    light = np.stack([110 + 60 * y, 150 + 40 * y, 190 - 60 * y], axis=2)
    image = np.where(bird[..., None], (92, 62, 40), light).astype(np.uint8)
    cells = (np.arange(groups) + 0.5) / groups - 0.5
    selected = (cells[None] / 0.4) ** 2 + (cells[:, None] / 0.3) ** 2 < 1
    predictions = [
        (name, 0.41, True),
        ("Pelagic_Cormorant", 0.28, False),
        ("Least_Auklet", 0.07, False),
        ("x", 0.0, False),
    ]
    attributes = [("has_bill_shape::curved_(up_or_down)", 0.93), ("has_wing_color::black", 0.81)]
    return Example(image, name, "unseen", selected, predictions, bird, attributes)


class Page(HTMLParser):
    """What a browser would ask for, the table cells of each row, the text and the tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.row_classes: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._in_cell = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = {name: value or "" for name, value in attrs}
        self.addresses += [
            named[name] for name in ("src", "href", "xlink:href", "srcset", "data", "action") if name in named
        ]
        self.ids += [named["id"]] if "id" in named else []
        if tag == "tr":
            self.rows.append([])
            self.row_classes.append(named.get("class", ""))
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def write(out: Path, **changes: Any) -> Page:
    parts: dict[str, Any] = {
        "metrics": METRICS,
        "history": HISTORY,
        "per_class": class_table(64, 30),
        "curve": seen_unseen(),
        "examples": [example(), example(NASTY)],
        "lineage": LINEAGE,
    }
    return Page(write_report(out, **{**parts, **changes}))


def test_the_page_requests_nothing(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    source = (tmp_path / "report.html").read_text("utf-8")
    assert "://" not in source and "@import" not in source and not re.search(r"url\((?!#)", source)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)


def test_the_table_shows_every_protocol_of_svip_and_eszsl_and_chance(tmp_path: Path) -> None:
    table = write(tmp_path).rows[:8]
    assert [row[0] for row in table] == ["Method", *["SVIP"] * 3, *["ESZSL"] * 3, "Chance"]
    assert [row[2:] for row in table[1:]] == [
        ["74.3", "58.0", "66.5", "62.0", "0.726"],
        ["74.3", "21.6", "78.8", "33.9", "0.000"],
        ["74.3", "61.3", "63.9", "62.6", "0.813"],
        ["61.2", "40.4", "49.1", "44.4", "0.152"],
        ["61.2", "14.7", "56.6", "23.4", "0.000"],
        ["61.2", "43.9", "46.3", "45.0", "0.178"],
        ["3.3", "1.1", "1.1", "-", "-"],
    ]


def test_only_the_validation_row_of_svip_is_the_result_and_oracle_rows_say_so(tmp_path: Path) -> None:
    page = write(tmp_path)
    results = [row for row, kind in zip(page.rows, page.row_classes, strict=True) if "result" in kind.split()]
    assert [row[:2] for row in results] == [["SVIP", "gamma chosen on the validation classes · the result"]]
    assert [row[0] for row in page.rows if row[1] == ORACLE] == ["SVIP", "ESZSL"]
    without = {**METRICS, "protocols": {"oracle": METRICS["protocols"]["oracle"]}}
    assert "No result:" in write(tmp_path, metrics=without).text


def test_markdown_has_the_same_numbers_and_labels(tmp_path: Path) -> None:
    write(tmp_path)
    lines = (tmp_path / "results.md").read_text("utf-8").splitlines()
    assert lines[0] == "| method | protocol | T1 | U | S | H | gamma |"
    result = ["SVIP", "gamma chosen on the validation classes", "74.3", "58.0", "66.5", "62.0", "0.726"]
    assert lines[2] == "| " + " | ".join(f"**{cell}**" for cell in result) + " |"
    assert lines[4] == f"| SVIP | {ORACLE} | 74.3 | 61.3 | 63.9 | 62.6 | 0.813 |"
    assert lines[8] == "| Chance | a class drawn at random | 3.3 | 1.1 | 1.1 | - | - |"


def test_nan_and_absent_numbers_are_a_dash() -> None:
    text = markdown_table({"protocols": {"validation": {"T1": float("nan"), "U": None, "S": 12.34, "gamma": 0.5}}})
    assert text.splitlines()[2].replace("*", "").endswith("| - | - | 12.3 | - | 0.500 |")


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    classes = class_table(3, 3)
    classes.loc[0, "class"] = NASTY
    metrics = {**METRICS, "comparators": {NASTY: {"protocols": METRICS["protocols"]}}, "settings": {"note": NASTY}}
    page = write(tmp_path, metrics=metrics, per_class=classes, lineage={NASTY: NASTY})
    assert "script" not in page.tags
    assert page.text.count(NASTY) >= 5  # comparator, class table, caption, prediction, lineage, settings
    row = (tmp_path / "results.md").read_text("utf-8").splitlines()[5]
    assert len(re.split(r"(?<!\\)\|", row)) == 9


def test_element_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert len(page.ids) == len(set(page.ids))
    source = (tmp_path / "report.html").read_text("utf-8")
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', source)) <= set(page.ids)


def test_missing_pieces_are_left_out(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path / "new", metrics={"protocols": {}}))
    assert "svg" not in page.tags and "img" not in page.tags
    headings = ["curve", "training", "classes", "examples"]
    assert not set(headings) & set(page.ids) and {"results", "terms", "lineage"} <= set(page.ids)
    assert set(headings) <= set(write(tmp_path).ids)
    empty = pd.DataFrame(columns=["class", "role", "images", "accuracy_zsl", "accuracy_gzsl"])
    assert "classes" not in write(tmp_path, per_class=empty, history=[]).ids


def test_patch_selection_is_set_against_chance(tmp_path: Path) -> None:
    text = " ".join(write(tmp_path, examples=[]).text.split())
    assert "cover 91.4 % of the object (as many patches drawn at random: 81.6 %)" in text
    assert "48.2 % of them lie on it (at random: 43.0 %)" in text


def test_717_classes_stay_readable_and_the_page_small(tmp_path: Path) -> None:
    noise = (
        np.random.default_rng(0).integers(0, 256, (12, 28, 28, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    )
    shown = example()
    many = [Example(image, "x", "seen", shown.selected, shown.predictions) for image in [*noise, noise[0]]]
    page = write(tmp_path, per_class=class_table(645, 72), examples=many, curve=seen_unseen(50_000))
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert page.tags.count("img") == 12 and "The first 12 of 13." in page.text
    assert "42 classes between" in page.text and "615 classes between" in page.text
    assert sum(row[1:2] == ["unseen"] for row in page.rows) == 72


def test_the_best_h_is_named_above_the_lines_and_marked_at_its_epoch() -> None:
    rising = [{**row, "val/H": 2.5 * epoch} for epoch, row in enumerate(HISTORY[:20])]
    figure = figures.validation_curves(rising)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (dot,) = (line for line in axes.lines if line.get_label() == "best H 47.5")
    assert [(float(x), float(y)) for x, y in np.asarray(dot.get_xydata())] == [(19.0, 47.5)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["best H 47.5"]
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    assert all(text.get_window_extent().x0 > axes.get_window_extent().x1 for text in axes.texts)


def test_a_class_name_as_long_as_the_embedded_data_sets_is_shown_whole() -> None:
    table = class_table(1, 2).assign(role="unseen")
    table["class"] = ["Emerald-winged Violet Spiketail", "b" * 33, "c" * 32]
    names = {text.get_text() for text in figures.class_bars(table, "unseen").axes[0].get_yticklabels()}
    assert names == {"Emerald-winged Violet Spiketail", "b" * 31 + "…", "c" * 32}


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"curve: lacks the columns \['unseen'\]"):
        write_report(tmp_path, metrics=METRICS, curve=pd.DataFrame({"gamma": [0.0], "seen": [1.0]}))
    assert list(tmp_path.iterdir()) == []


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    write(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.md"]


def test_hatching_leaves_selected_groups_as_they_are_and_darkens_the_others() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    selected = np.array([[True, False], [False, True]])
    figure = figures.example_tile(image, selected)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)  # type: ignore[attr-defined]
    half = pixels.shape[0] // 2
    inner = slice(4, half - 4)
    outer = slice(half + 4, 2 * half - 4)
    assert np.all(pixels[inner, inner] == 200) and np.all(pixels[outer, outer] == 200)
    striped = pixels[inner, outer]
    assert striped.mean() < 175 and striped.std() > 20  # darker on the whole, and not plainly so


def test_hatching_refuses_a_mask_in_place_of_the_grid() -> None:
    with pytest.raises(ValueError, match="selected"):
        figures.example_tile(np.zeros((8, 8, 3), np.uint8), np.zeros((2, 2, 1), bool))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("grizzly+bear", "grizzly bear"),
        ("has_bill_shape::hooked", "has bill shape: hooked"),
        ("3.14", "3.14"),
    ],
)
def test_names_read_as_words(name: str, expected: str) -> None:
    assert figures.readable(name) == expected


@pytest.mark.parametrize(
    ("method", "shown"), [("svip", "SVIP"), ("svip-readout=cls", "SVIP-readout=cls"), ("baseline", "Baseline")]
)
def test_the_table_and_the_title_say_what_was_trained(tmp_path: Path, method: str, shown: str) -> None:
    page = write(tmp_path, metrics={**METRICS, "method": method})
    row = (tmp_path / "results.md").read_text("utf-8").splitlines()[2]
    assert row.startswith(f"| **{shown}** |")
    assert f"{shown} on CUB" in page.text
