"""Which code made a run."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import svip

log = logging.getLogger(__name__)


def git_sha() -> str:
    """Commit of svip's own checkout, with ``-dirty`` where it was edited; else SVIP_GIT_SHA, else ``unknown``."""
    checkout = Path(svip.__file__).parents[1]
    if (checkout / ".git").exists():  # not some other repository around an installed svip
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            log.debug("git can't describe %s", checkout)
    return os.environ.get("SVIP_GIT_SHA") or "unknown"


def with_code_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    common = {"git_sha": git_sha(), "image_digest": os.environ.get("SVIP_IMAGE_DIGEST", "")}
    return {key: value for key, value in {**common, **(tags or {})}.items() if value}
