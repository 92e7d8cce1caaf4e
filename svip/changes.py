"""What a run does otherwise than its preset, in words short enough for its name."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from svip.config import Config, flatten, variant

CHANGE_NOTHING = ("data.root", "data.mirror", "train.device", "train.workers", "train.checkpoint_steps")
"""Where and in what portions a run works: two runs that differ in these alone are meant to give the same numbers."""
NOT_OF_TRAINING = (*CHANGE_NOTHING, "evaluation.")
"""Beginnings of the keys that decide nothing of a training: what was begun goes on with others too."""
PAPER = {"model.selected_groups": "M", "train.seed": "seed"}
"""Keys that have a better short name than their last part."""
IN_VARIANT = ("model.contextualize", "model.context", "model.readout")
"""Keys that ``config.variant`` says already."""
LONGEST_NAME = 100
"""Characters of a run's name; MLflow's tables show about half of that."""


def changes(config: Config, base: Config) -> dict[str, str]:
    """Dotted key -> the value of ``config`` as text, for all that isn't as in ``base`` (CHANGE_NOTHING left out)."""
    now, before = expanded(flatten(config)), expanded(flatten(base))
    keys = [*now, *(key for key in before if key not in now)]
    return {key: as_text(now.get(key)) for key in keys if key not in CHANGE_NOTHING and now.get(key) != before.get(key)}


def changes_text(changed: Mapping[str, str]) -> str:
    """For the tag: ``optim.lr=1e-05, model.selected_groups=4``; empty where nothing was changed."""
    return ", ".join(f"{key}={value}" for key, value in changed.items())


def run_name(step: str, config: Config, changed: Mapping[str, str], run: str = "") -> str:
    """``train-svip lr=1e-5 M=4``: the step, what is trained (``run``, else its variant) and what was changed."""
    return with_changes(f"{step}-{run or variant(config)}", {k: v for k, v in changed.items() if k not in IN_VARIANT})


def with_changes(name: str, changed: Mapping[str, str]) -> str:
    """A name and the changes behind it, as many as fit; the number of those that don't."""
    words = [f"{short_key(key)}={short_value(value)}" for key, value in changed.items()]
    for shown in range(len(words), -1, -1):
        rest = [f"+{len(words) - shown}"] if shown < len(words) else []
        full = " ".join([name, *words[:shown], *rest])
        if len(full) <= LONGEST_NAME:
            break
    return full


def short_key(key: str) -> str:
    """The last part of a dotted key, or all of it where several keys end so."""
    leaf = key.rpartition(".")[2]
    return PAPER.get(key) or (leaf if _leaves()[leaf] < 2 else key)


def as_text(value: Any) -> str:
    """A value as it would be written in an override: ``1e-05``, ``true``, ``[none,oracle]``, ``null``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return f"[{','.join(map(as_text, value))}]" if isinstance(value, list) else str(value)


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a key for each entry of a mapping: ``model.backbone_args.depth``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= (
            {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, Mapping) else {key: value}
        )
    return found


def short_value(text: str) -> str:
    """A path's last part, and an exponent without its zero."""
    name = PurePath(text).name if "/" in text else text
    return name.replace("e-0", "e-") if _is_number(name) else name


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@functools.cache
def _leaves() -> Counter[str]:
    return Counter(key.rpartition(".")[2] for key in flatten(Config()))
