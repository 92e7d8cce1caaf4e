"""What continuous integration makes of tests that skip."""

from __future__ import annotations

import pytest
from conftest import required


def skipped(reason: str) -> pytest.TestReport:
    return pytest.TestReport("test_x", ("x.py", 1, "test_x"), {}, "skipped", ("x.py", 1, f"Skipped: {reason}"), "setup")


def test_with_svip_require_a_test_fails_for_want_of_a_program_but_not_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVIP_REQUIRE", raising=False)
    assert required(skipped("needs a Docker engine")).outcome == "skipped"
    monkeypatch.setenv("SVIP_REQUIRE", "1")
    assert required(skipped("needs a Docker engine")).outcome == "failed"
    assert required(skipped("no shared data at ../shared; set SVIP_SHARED")).outcome == "skipped"
