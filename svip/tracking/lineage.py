"""Which code and which environment made a run."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import svip

log = logging.getLogger(__name__)

PACKAGES = ("svip", "components", "pipelines")
"""Folders whose new files belong to the code although git doesn't know them yet."""
LARGEST_FILE = 200_000
"""Characters of one file's changes that a diff shows; what changed so much was hardly written by hand."""
LARGEST_DIFF = 2_000_000


def git_sha() -> str:
    """Commit of svip's own checkout, with ``-dirty`` where it was edited; else SVIP_GIT_SHA, else ``unknown``."""
    checkout = _checkout()
    if checkout:
        try:
            return _git(checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()
        except (OSError, subprocess.CalledProcessError):
            log.debug("git can't describe %s", checkout)
    return os.environ.get("SVIP_GIT_SHA") or "unknown"


@dataclass(frozen=True)
class CodeDiff:
    """What svip's checkout has that its commit has not."""

    text: str
    """As ``git diff`` writes it, with new files of the packages; ``git apply`` takes it unless it says what it lacks.

    Binary files are only named, and so is a file with very many changes."""
    sha256: str
    """Of the whole of it, whatever ``text`` leaves out."""


def code_diff() -> CodeDiff | None:
    """The uncommitted changes of svip's own checkout; None where there are none, or no checkout."""
    checkout = _checkout()
    if not checkout:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            # in an index of its own, so that new files can be added; its time tells git which entries it has to look at
            index = Path(folder) / "index"
            shutil.copy2(checkout / _git(checkout, "rev-parse", "--git-path", "index").strip(), index)
            packages = [name for name in PACKAGES if (checkout / name).is_dir()]
            _git(checkout, "add", "--intent-to-add", "--", *packages, index=index)
            text = _git(checkout, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD", index=index)
    except (OSError, subprocess.CalledProcessError):
        log.debug("git can't compare %s with its commit", checkout)
        return None
    if not text:
        return None
    return CodeDiff(_shortened(text), hashlib.sha256(text.encode()).hexdigest())


def environment(device: str = "") -> dict[str, str]:
    """What a run's numbers may depend on besides code, data and configuration, the versions of all packages included.

    Keys are ``python``, ``platform``, ``processors``, ``image`` ..., and ``package NAME``.
    """
    import torch  # here, as some steps go without it

    cuda = torch.version.cuda if torch.cuda.is_available() else None
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "device": device,
        "cuda": cuda or "",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "",
        "gpus": ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())),
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "image": os.environ.get("SVIP_IMAGE_DIGEST", ""),
    }
    packages = {dist.metadata["Name"]: dist.version for dist in distributions() if dist.metadata["Name"] != "svip"}
    named = {f"package {name}": packages[name] for name in sorted(packages, key=str.lower)}
    return {key: value for key, value in {**facts, **named}.items() if value}


def environment_text(facts: Mapping[str, str]) -> str:
    """environment.txt: facts as comments, then the packages, so that ``pip install -r`` takes it."""
    lines = [
        f"{key.removeprefix('package ')}=={value}" if key.startswith("package ") else f"# {key}: {value}"
        for key, value in facts.items()
    ]
    return "\n".join(lines) + "\n"


def parse_environment(text: str) -> dict[str, str]:
    """What ``environment_text`` wrote."""
    found = {}
    for line in text.splitlines():
        if fact := re.fullmatch(r"# ([^:]+): (.*)", line):
            found[fact[1]] = fact[2]
        elif package := re.fullmatch(r"([^#=]+)==(.+)", line):
            found[f"package {package[1]}"] = package[2]
    return found


def with_code_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    common = {"git_sha": git_sha(), "image_digest": os.environ.get("SVIP_IMAGE_DIGEST", "")}
    return {key: value for key, value in {**common, **(tags or {})}.items() if value}


def _checkout() -> Path | None:
    folder = Path(svip.__file__).parents[1]
    return folder if (folder / ".git").exists() else None  # not some other repository around an installed svip


def _git(checkout: Path, *arguments: str, index: Path | None = None) -> str:
    environment = {**os.environ, **({"GIT_INDEX_FILE": str(index)} if index else {})}
    command = ["git", "-C", str(checkout), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, env=environment)
    return done.stdout.decode(errors="replace")


def _shortened(diff: str) -> str:
    """A diff without the changes of files that have too many, each file's header kept."""
    kept, size = [], 0
    for part in re.split(r"^(?=diff --git )", diff, flags=re.MULTILINE):
        if len(part) > LARGEST_FILE or size + len(part) > LARGEST_DIFF:
            header = re.split(r"^(?=@@ )", part, maxsplit=1, flags=re.MULTILINE)[0]
            part = f"{header[:2000].rstrip()}\n# {len(part) - len(header)} characters of changes are left out\n"
        kept.append(part)
        size += len(part)
    return "".join(kept)
