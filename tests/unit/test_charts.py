"""The charts that training and evaluation leave; the numbers of the confusions worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svip.evaluation.charts import confusion_matrix, confusions, training_charts

# classes 0 and 1 are seen; 2, 3 and 4 unseen, and of 4 there are no images
SCORES = np.array(
    [
        [0.1, 0.0, 0.9, 0.2, 0.0],  # a 2, taken for 2
        [0.8, 0.0, 0.5, 0.2, 0.0],  # a 2: seen class 0 is ahead by 0.3
        [0.1, 0.0, 0.2, 0.3, 0.9],  # a 3, taken for 4
        [0.9, 0.0, 0.2, 0.3, 0.0],  # a 3: seen class 0 is ahead by 0.6
        [0.9, 0.0, 0.2, 0.3, 0.0],  # a 0, which is no unseen class
    ]
)
LABELS, UNSEEN = np.array([2, 2, 3, 3, 0]), np.array([2, 3, 4])


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        (0.0, [[0.5, 0, 0.5], [0, 0, 1]]),
        (0.4, [[1, 0, 0], [0, 0, 1]]),
        (0.7, [[1, 0, 0], [0, 0.5, 0.5]]),
    ],
)
def test_confusions_say_what_images_of_unseen_classes_are_taken_for(gamma: float, expected: list[list[float]]) -> None:
    shares, tested = confusions(SCORES, LABELS, UNSEEN, gamma)
    assert tested == [2, 3]
    np.testing.assert_array_equal(shares, expected)


def test_a_matrix_of_few_classes_has_its_numbers() -> None:
    few = confusion_matrix(np.array([[0.5, 0, 0.5], [0, 0.004, 0.996]]), ["001.Red_bird", "blue"])
    axes = few.axes[0]
    assert [text.get_text() for text in axes.texts] == ["50", "50", "100"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Red bird", "blue", "any other class"]
    many = confusion_matrix(np.eye(50, 51), [str(number) for number in range(50)])
    assert not many.axes[0].texts


@pytest.mark.parametrize("validated", [True, False])
def test_training_leaves_its_losses_and_what_was_validated(tmp_path: Path, validated: bool) -> None:
    rows = [{"phase": "final", "epoch": epoch, "train/loss": 3.0 / epoch} for epoch in (1, 2)]
    if validated:
        rows = [row | {"phase": "select", "val/H": 10.0} for row in rows]
    (tmp_path / "history.json").write_text(json.dumps(rows))
    folder = training_charts(tmp_path)
    files = sorted(file.name for file in folder.iterdir())
    assert files == (["losses.png", "validation.png"] if validated else ["losses.png"])
    for file in files:
        with Image.open(folder / file) as image:
            assert image.size > (400, 300)
