"""The authors' released checkpoints: read without running anything of the file, and mapped onto our model.

Their file is a pickle of a dictionary: ``network`` (a state dict under the published code's names) beside an argparse
Namespace, numpy scalars and the like. Only tensors and plain containers are built from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Self
from zipfile import ZipFile

import torch
from torch import Tensor, serialization

from svip.models.svip import SVIP

OURS_AND_THEIRS = {
    "backbone.vit.": "",
    "patch_classifier.": "token_cls.",
    "context.to_width.": "v2p.",
    "context.to_tokens.": "p2t.",
    "patch_head.": "head_1.",
}
"""How a parameter's name begins here and in the published code, which has the backbone's names from timm."""
UNUSED = "head."
"""A layer of the published model that nothing reads."""
UNREAD = (
    *("argparse.Namespace", "numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
"""What may stand in a file beside tensors and plain containers; all of it is left unread."""

BYTEARRAY = b"bytearray"
"""The one type that torch builds of any size that a file asks for."""


class PublishedError(ValueError):
    """A file that is no released checkpoint, or does not fit the preset; the message names file and tensors."""


class Unread:
    """Takes the place of an object that is not needed: whatever the file would build it of is dropped.

    The real types would run code on the file's content (numpy trusts the state that a dtype is given).
    """

    def __new__(cls, *arguments: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def load_published(model: SVIP, path: Path) -> list[str]:
    """Fill a model (on the CPU) from a released checkpoint; the names in the file that no one uses.

    PublishedError lists all parameters that are missing, left over, of another type or shape, or not finite; the model
    is then unchanged.
    """
    network = read_network(path)
    wanted = {published_name(name): parameter for name, parameter in model.named_parameters()}
    left_over = sorted(network.keys() - wanted.keys())
    both = [name for name in wanted if name in network]
    other = [name for name in both if _form(network[name]) != _form(wanted[name])]
    problems = {
        "missing": [name for name in wanted if name not in network],
        "left over": [name for name in left_over if not name.startswith(UNUSED)],
        "of another form": [f"{name} (expected {_form(wanted[name])}, found {_form(network[name])})" for name in other],
        "not finite": [name for name in both if name not in other and not network[name].isfinite().all()],
    }
    found = [f"{what}: {_first(names)}" for what, names in problems.items() if names]
    if found:
        raise PublishedError(
            f"{path} does not fit ({'; '.join(found)}); give the preset and the word vectors it was trained with"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(network[name])
    return left_over


def published_name(name: str) -> str:
    """What the published code calls our parameter; a name without a counterpart stays."""
    for ours, theirs in OURS_AND_THEIRS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def read_network(path: Path) -> dict[str, Any]:
    """The state dict in a released checkpoint, under the published names without DataParallel's ``module.``.

    Its values are as the file has them. PublishedError names what the file would have run, or why it can't be read.
    """
    registered = serialization.get_safe_globals()
    try:
        _refuse_bombs(path)
        serialization.clear_safe_globals()  # libraries allow types of theirs, and some of these do things when built
        with serialization.safe_globals([(Unread, name) for name in UNREAD]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or foreign file
        raise PublishedError(f"{path} is not a released checkpoint: {_reason(error)}. Nothing of it was run") from error
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(registered)
    # dict's own methods: a file may give an OrderedDict attributes that hide them
    network = dict.get(content, "network") if isinstance(content, dict) else None
    items = dict.items(network) if isinstance(network, dict) else []
    if not items or not all(isinstance(name, str) and name.isprintable() for name, _ in items):
        raise PublishedError(
            f"{path} is not a released checkpoint: expected a dictionary with a state dict as 'network'"
        )
    parallel = all(name.startswith("module.") for name, _ in items)
    return {name.removeprefix("module.") if parallel else name: value for name, value in items}


def _refuse_bombs(path: Path) -> None:
    """ValueError for what would fill the memory: torch.save does not compress, and makes no bytearrays of any size."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                pickled = content.find(BYTEARRAY) >= 0
        else:
            with ZipFile(file) as archive:
                unpacked = sum(item.file_size for item in archive.infolist())
                if unpacked > path.stat().st_size:
                    raise ValueError(f"it unpacks to {unpacked:,} bytes, more than its own size")
                pickled = any(
                    BYTEARRAY in archive.read(item) for item in archive.infolist() if item.filename.endswith(".pkl")
                )
    if pickled:
        raise ValueError("it holds a bytearray, which no model does")


def _reason(error: Exception) -> str:
    """The core of torch's message, without its advice to read the file unsafely."""
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it holds more than tensors, and would have run {refused[1]!r}"
    first = text.splitlines()[0][:200] if text else ""
    return f"{type(error).__name__} {first!r}"


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    place = "" if value.layout is torch.strided and value.device.type == "cpu" else f" {value.layout} {value.device}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{place}"


def _first(names: Sequence[str], shown: int = 6) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
