"""What is uncommitted in a checkout, and environments written and read back."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from svip.tracking.lineage import LARGEST_FILE, code_diff, environment, environment_text, parse_environment

Git = Callable[..., str]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of svip's own with two modules, to be edited."""
    package = tmp_path / "svip"
    package.mkdir()
    for name in ("__init__.py", "model.py"):
        (package / name).write_text("rate = 1\n")
    (tmp_path / ".gitignore").write_text("*.pyc\n")
    monkeypatch.setattr("svip.__file__", str(package / "__init__.py"))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_there_is_no_diff_of_what_is_committed_or_of_no_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "notes.txt").write_text("no code")
    (checkout / "svip" / "model.pyc").write_text("ignored")
    assert code_diff() is None
    monkeypatch.setattr("svip.__file__", str(checkout.parent / "elsewhere" / "svip" / "__init__.py"))
    assert code_diff() is None


def test_the_diff_makes_of_the_commit_what_ran(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (checkout / "svip" / "model.py").write_text("rate = 2\n")
    (checkout / "svip" / "new.py").write_text("idea = 3\n")
    git(checkout, "add", "svip/model.py")  # staged or not
    before = git(checkout, "status", "--porcelain")
    diff = code_diff()
    assert diff
    assert git(checkout, "status", "--porcelain") == before, "the user's index is left alone"
    clone = tmp_path_factory.mktemp("clone")
    git(clone, "clone", "-q", str(checkout), ".")
    (clone / "code.diff").write_text(diff.text)
    git(clone, "apply", "code.diff")
    assert (clone / "svip" / "model.py").read_text() == "rate = 2\n"
    assert (clone / "svip" / "new.py").read_text() == "idea = 3\n"


def test_binary_and_huge_files_are_named_only_but_count(checkout: Path) -> None:
    huge = checkout / "svip" / "huge.py"
    (checkout / "svip" / "weights.bin").write_bytes(bytes(range(256)) * 10)
    (checkout / "svip" / "model.py").write_text("rate = 2\n")
    huge.write_text("x = 1\n" * LARGEST_FILE)
    diff = code_diff()
    assert diff and len(diff.text) < 2000
    assert "Binary files /dev/null and b/svip/weights.bin differ" in diff.text
    assert "b/svip/huge.py" in diff.text and "characters of changes are left out" in diff.text
    assert "+rate = 2" in diff.text
    huge.write_text("x = 1\n" * (LARGEST_FILE - 1) + "y = 1\n")
    changed = code_diff()
    assert changed and len(changed.text) == len(diff.text) and changed.sha256 != diff.sha256


def test_an_environment_is_read_back_as_it_was_and_installs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SVIP_IMAGE_DIGEST", "sha256:12")
    facts = environment("cuda:0")
    assert (facts["image"], facts["device"], facts["processors"]) == ("sha256:12", "cuda:0", str(os.cpu_count()))
    assert "package torch" in facts and "package svip" not in facts
    text = environment_text(facts)
    assert parse_environment(text) == facts
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
    assert all(len(line.split("==")) == 2 for line in lines), "pip reads it as requirements"
