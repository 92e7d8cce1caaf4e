"""infra/compose.yaml as Compose reads it with an infra/.env, for the tests of this folder."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parents[2] / "infra"
PARTS = ("server.sh", ".env.example", "compose.yaml")


def copy_infra(folder: Path) -> Path:
    """A copy of what the server is made of, without any .env of the checkout's user."""
    (folder / "infra").mkdir()
    for part in PARTS:
        shutil.copy(INFRA / part, folder / "infra")
    shutil.copytree(INFRA / "k8s/base/files", folder / "infra/k8s/base/files")
    return folder / "infra"


def make_env(infra: Path) -> dict[str, str]:
    """What ``server.sh`` writes to .env before the first start."""
    subprocess.run([infra / "server.sh", "env"], check=True, capture_output=True)
    return read_env(infra / ".env")


def read_env(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def services(env: dict[str, str]) -> dict[str, Any]:
    """The services, each ``${NAME}`` in its place; KeyError for one that ``env`` lacks and that has no default."""
    text = re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", lambda found: _value(found, env), _text())
    return dict(yaml.safe_load(text)["services"])


def used_names() -> set[str]:
    """Names of .env that compose.yaml reads."""
    return set(re.findall(r"\$\{(\w+)", _text()))


def _text() -> str:
    return (INFRA / "compose.yaml").read_text()


def _value(found: re.Match[str], env: dict[str, str]) -> str:
    name, mark, rest = found.groups()
    return env.get(name) or rest if mark == "-" else env[name]
