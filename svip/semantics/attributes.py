"""Attribute names as words: what of ``has_bill_shape::curved_(up_or_down)`` or ``longleg`` is looked up.

All that is particular to a data set is plain data at the top of this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

STOP_WORDS = frozenset(
    ["a", "about", "an", "and", "are", "as", "at", "be", "being", "has", "in", "is", "like", "of", "on", "or"]
    + ["than", "the", "things", "to"]
)
"""Words that say nothing of an attribute; ``very``, ``no``, ``up`` and ``down`` do and are kept."""

NAMES: dict[str, dict[str, str]] = {
    "sun": {
        "wood (not part of a tree)": "wood",  # a mean of vectors can't say not
        "rock/stone": "rock stone",
        "transporting things or people": "transporting goods people",
    },
}
"""Data set -> whole attribute name -> the phrase that stands for it."""

WORDS: dict[str, dict[str, str]] = {
    "cub": {
        "eyering": "eye ring",
        "eyeline": "eye line",
    },
    "awa2": {
        "toughskin": "tough skin",
        "longleg": "long leg",
        "longneck": "long neck",
        "chewteeth": "chew teeth",
        "meatteeth": "meat teeth",
        "buckteeth": "buck teeth",
        "strainteeth": "strain teeth",
        "flys": "flies",  # as it is spelt in predicates.txt; GloVe knows flys, but as a name
        "quadrapedal": "quadrupedal",
        "newworld": "new world",
        "oldworld": "old world",
        "nestspot": "nest spot",
    },
}
"""Data set -> glued or misspelt word -> the words that stand for it."""


def attribute_phrases(dataset: str, names: Sequence[str]) -> list[list[str]]:
    """The words of each attribute, lower case, in reading order, each once.

    Punctuation and hyphens part words; numbers (``5_-_9_in``) and STOP_WORDS are dropped; NAMES and WORDS of the data
    set are applied. ValueError names an attribute of which nothing is left.
    """
    phrases = [_words(name, NAMES.get(dataset, {}), WORDS.get(dataset, {})) for name in names]
    for name, phrase in zip(names, phrases, strict=True):
        if not phrase:
            raise ValueError(
                f"attribute {name!r} of {dataset!r} has no words; give it a phrase in svip/semantics/attributes.py"
            )
    return phrases


def _words(name: str, whole_names: Mapping[str, str], words: Mapping[str, str]) -> list[str]:
    text = whole_names.get(name.strip(), name).lower()
    found = re.findall(r"[^\W\d_]+", text)
    found = [part for word in found for part in words.get(word, word).split()]
    return list(dict.fromkeys(word for word in found if word not in STOP_WORDS))
