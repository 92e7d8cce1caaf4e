"""Attribute names as words: what of ``has_bill_shape::curved_(up_or_down)`` or ``longleg`` is looked up.

All that is particular to a data set is in its file of rules, ``svip/semantics/phrases/NAME.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from svip.data.errors import DataError

STOP_WORDS = frozenset(
    ["a", "about", "an", "and", "are", "as", "at", "be", "being", "has", "in", "is", "like", "of", "on", "or"]
    + ["than", "the", "things", "to"]
)
"""Words that say nothing of an attribute; ``very``, ``no``, ``up`` and ``down`` do and are kept."""
SHIPPED = Path(__file__).with_name("phrases")


@dataclass(frozen=True)
class Rules:
    """How the attribute names of one data set are read."""

    names: Mapping[str, str] = field(default_factory=dict)
    """Whole attribute name -> the phrase that stands for it."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Glued, short or misspelt word (lower case) -> the words that stand for it."""


def read_rules(path: Path) -> Rules:
    """The rules of a YAML file with the mappings ``names`` and ``words``, or one of them; DataError when it is none."""
    expected = f"{path}: expected the mappings names and words, from text to text, as in {SHIPPED / 'awa2.yaml'}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{expected} ({error})") from error
    if not isinstance(content, dict) or not content.keys() <= {"names", "words"}:
        raise DataError(expected)
    for part, rules in content.items():
        if not isinstance(rules, dict):
            raise DataError(f"{expected}; found {type(rules).__name__} as {part}")
        for key, value in rules.items():
            if not isinstance(key, str) or not isinstance(value, str):  # YAML reads no and on as truth values
                raise DataError(f"{expected}; in {part} found {key!r}: {value!r}, which may lack quotes")
    return Rules(**content)


def shipped_rules(dataset: str) -> Rules:
    """The rules that come with svip for a data set; none for one that has no file."""
    path = SHIPPED / f"{dataset}.yaml"
    return read_rules(path) if path.is_file() else Rules()


def attribute_phrases(names: Sequence[str], rules: Rules) -> list[list[str]]:
    """The words of each attribute, lower case, in reading order, each once.

    Punctuation and hyphens part words; numbers (``5_-_9_in``) and STOP_WORDS are dropped; the rules are applied.
    DataError names an attribute of which nothing is left.
    """
    phrases = [_words(name, rules) for name in names]
    for name, phrase in zip(names, phrases, strict=True):
        if not phrase:
            raise DataError(f"attribute {name!r} has no words; give it a phrase in a file of rules (semantics.phrases)")
    return phrases


def _words(name: str, rules: Rules) -> list[str]:
    text = rules.names.get(name.strip(), name).lower()
    found = re.findall(r"[^\W\d_]+", text)
    found = [part for word in found for part in rules.words.get(word, word).split()]
    return list(dict.fromkeys(word for word in found if word not in STOP_WORDS))
