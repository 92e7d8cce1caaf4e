"""Who may import whom (the architecture, held by a test): all import statements are read, also those in functions."""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("svip", "components", "pipelines")
LAYERS = (
    {"svip", "svip.config", "svip.changes", "svip.nearest"},
    {"svip.data", "svip.semantics", "svip.models", "svip.losses", "svip.tracking"},
    {"svip.training", "svip.evaluation", "svip.sweep", "svip.trainjob"},
    {"svip.steps", "svip.predict", "svip.tuning", "svip.benchmark", "svip.mlflow_model", "svip.doctor"},
    {"svip.cli"},
)
"""From the lowest: a module imports from its own layer and those below."""


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules it imports; ``from a import b`` counts as a.b where that is one of ours, else as a."""
    files = {_module(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}:{node.lineno}: write the import absolutely"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in files else node.module for name in names}
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def users_of(package: str) -> set[str]:
    return {module for module, targets in imports().items() if any(within(target, package) for target in targets)}


def layer(module: str) -> int:
    names = {module, ".".join(module.split(".")[:2])}
    levels = [level for level, members in enumerate(LAYERS) if names & members and (module == "svip" or "." in module)]
    assert levels, f"{module} belongs to no layer: add it to LAYERS"
    return levels[0]


def test_no_module_imports_itself_through_others() -> None:
    ours = {
        module: {target for target in targets if target in imports() and target != module}
        for module, targets in imports().items()
    }
    graphlib.TopologicalSorter(ours).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("kfp", {"components", "pipelines"}),
        ("mlflow", {"svip.tracking", "svip.mlflow_model"}),
        ("optuna", {"svip.tuning"}),
        ("typer", {"svip.cli", "pipelines.cli", "pipelines.cluster_cli"}),
        ("components", {"components", "pipelines"}),
        ("kubeflow", {"svip.trainjob"}),
        ("pipelines", {"pipelines"}),
    ],
)
def test_a_package_is_imported_only_where_it_belongs(package: str, allowed: set[str]) -> None:
    strangers = {user for user in users_of(package) if not any(within(user, name) for name in allowed)}
    assert not strangers, f"{sorted(strangers)} import {package}; only {sorted(allowed)} may"


def test_components_see_nothing_of_svip_but_its_steps() -> None:
    for module, targets in imports().items():
        if within(module, "components"):
            assert {target for target in targets if within(target, "svip")} <= {"svip.steps"}, module


def test_svip_modules_import_only_from_their_own_layer_and_below() -> None:
    upwards = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        if within(module, "svip") and within(target, "svip") and layer(target) > layer(module)
    ]
    assert not upwards


def test_files_stay_short_enough_to_be_read() -> None:
    lines = {path: _lines(path) for package in OURS for path in (ROOT / package).rglob("*.py")}
    assert not {path.name: count for path, count in lines.items() if count > 400}
    svip = sum(count for path, count in lines.items() if path.is_relative_to(ROOT / "svip"))
    assert svip <= 15500
    assert sum(lines.values()) - svip <= 2800


def _lines(path: Path) -> int:
    """Lines that hold something."""
    return sum(bool(line.strip()) for line in path.read_text().splitlines())
