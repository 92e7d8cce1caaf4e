"""Attribute groups: every attribute once, and together what belongs together."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from svip.data.synthetic import ATTRIBUTES, GROUPS
from svip.semantics.groups import FIRST_OF_KIND, attribute_groups


def test_names_are_grouped_by_what_stands_before_the_colons() -> None:
    names = ["has_bill_shape::hooked", "has_size::big", "has_bill_shape::dagger", "has_size::small", "round", "red"]
    assert attribute_groups("cub", names) == [[0, 2], [1, 3], [4, 5]]
    assert attribute_groups("custom", ["red", "round"]) == [[0, 1]]


def test_synthetic_data_has_the_groups_it_was_made_of() -> None:
    groups = attribute_groups("synthetic", ATTRIBUTES)
    assert [len(group) for group in groups] == [len(values) for values in GROUPS.values()]
    assert [index for group in groups for index in group] == list(range(len(ATTRIBUTES)))


def test_a_kind_reaches_to_the_next_one_and_may_come_again() -> None:
    names = [part for first in FIRST_OF_KIND["awa2"] for part in (first, f"after {first}")]
    groups = attribute_groups("awa2", names)
    assert len(groups) == 9
    assert [names[index] for index in groups[3]] == ["flippers", "after flippers", "bipedal", "after bipedal"]
    assert groups[4] == [8, 9, 20, 21], "character: smelly, fierce"


def test_apy_s_attributes_are_of_three_kinds() -> None:
    names = ["2D Boxy", "Round", "Tail", "Row Wind", "Screen", "Skin", "Leather"]
    assert attribute_groups("apy", names) == [[0, 1], [2, 3, 4], [5, 6]]


@pytest.mark.parametrize("change", [lambda names: names[1:], lambda names: ["new", *names]])
def test_another_list_than_the_data_set_s_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match="attributes of sun: expected the original list .* 'sailing/ boating'"):
        attribute_groups("sun", change(list(FIRST_OF_KIND["sun"])))


def listed(path: Path) -> list[str]:
    """The names of a file of numbered lines."""
    return [line.split(maxsplit=1)[1].strip() for line in path.read_text().splitlines()]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("dataset", "file", "sizes"),
    [
        ("awa2", "awa2/Animals_with_Attributes2/predicates.txt", [8, 6, 4, 17, 8, 10, 5, 11, 16]),
        ("sun", "sun/attributes.txt", [36, 38, 13, 15]),
    ],
)
def test_the_original_lists_are_grouped_whole(shared: Path, dataset: str, file: str, sizes: list[int]) -> None:
    names = listed(shared / "data" / file)
    groups = attribute_groups(dataset, names)
    assert sorted(index for group in groups for index in group) == list(range(len(names)))
    assert [len(group) for group in groups] == sizes
    together = {name: number for number, group in enumerate(groups) for name in [names[index] for index in group]}
    same = {
        "awa2": [
            ("tusks", "quadrapedal"),
            ("muscle", "hops"),
            ("skimmer", "plankton"),
            ("smelly", "nestspot"),
            ("newworld", "oldworld"),
        ],
        "sun": [("praying", "driving"), ("fire", "trees"), ("cold", "rusty"), ("stressful", "no horizon")],
    }[dataset]
    for one, other in same:
        assert together[one] == together[other], (one, other)


@pytest.mark.shared
def test_cub_has_its_28_groups_and_the_stored_run_merges_all_but_two(shared: Path) -> None:
    groups = attribute_groups("cub", listed(shared / "data/cub/attributes.txt"))
    assert len(groups) == 28
    assert [index for group in groups for index in group] == list(range(312))
    assert [len(group) for group in groups[:5]] == [9, 15, 15, 15, 4]
    path = shared / "golden/published_code_cub.npz"
    if not path.is_file():
        pytest.skip(f"{path} does not exist")
    golden = ast.literal_eval(str(np.load(path)["spec"]))["groups"]
    assert golden == [*groups[:2], list(range(24, 312))]
