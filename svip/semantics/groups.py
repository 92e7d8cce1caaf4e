"""Attribute groups: which attributes describe the same kind of thing, and so compete with each other."""

from __future__ import annotations

from collections.abc import Sequence

FIRST_OF_KIND: dict[str, dict[str, str]] = {
    "awa2": {
        "black": "color",
        "patches": "texture",
        "big": "shape",
        "flippers": "body parts",
        "smelly": "character",
        "flys": "activity",
        "bipedal": "body parts",
        "active": "behaviour",
        "fish": "nutrition",
        "newworld": "habitat",
        "fierce": "character",
    },
    "apy": {
        "2D Boxy": "shape",
        "Tail": "parts",
        "Skin": "materials",
    },
    "sun": {
        "sailing/ boating": "functions and affordances",
        "fencing": "materials",
        "natural light": "surface properties",
        "natural": "spatial envelope",
    },
}
"""Data set -> attribute -> the kind of it and of those that follow it, up to the next one named here.

awa2: predicates.txt in the nine kinds of APN (Xu et al., "Attribute Prototype Network for Zero-Shot Learning", NeurIPS
2020) as code built on it lists them, but for newworld, which is nutrition there and a habitat here.
apy: attribute_names.txt in the three of Farhadi et al., "Describing Objects by their Attributes", CVPR 2009.
sun: attributes.txt in the four kinds of Patterson et al., "The SUN Attribute Database", IJCV 2014; where one ends in
the file's order is our reading: light and temperature count as surface properties, mood as spatial envelope.
"""


def attribute_groups(dataset: str, names: Sequence[str]) -> list[list[int]]:
    """The attributes' indices by group, each in exactly one; groups stand in the order of their first attribute.

    Data sets of FIRST_OF_KIND are grouped by it (ValueError names what their list lacks). Elsewhere a group is what
    names have before ``::`` (CUB's ``has_bill_shape::hooked``); those without one form a group.
    """
    first = FIRST_OF_KIND.get(dataset, {})
    lacking = first.keys() - {name.strip() for name in names}
    if lacking or (first and names[0].strip() not in first):
        raise ValueError(
            f"attributes of {dataset}: expected the original list in its order, which begins with "
            f"{next(iter(first))!r}; lacking: {', '.join(sorted(lacking)) or 'none'}"
        )
    groups: dict[str, list[int]] = {}
    kind = ""
    for index, name in enumerate(names):
        kind = first.get(name.strip(), kind) if first else name.rpartition("::")[0]
        groups.setdefault(kind, []).append(index)
    return list(groups.values())
