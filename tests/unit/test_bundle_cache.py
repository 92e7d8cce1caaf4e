"""Bundles of a web server: where they are kept, what they survive, and what is refused before any work."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from svip import steps
from svip.data.bundle import Bundle, BundleError, BundleWriter, DataError
from svip.data.bundle_cache import cached_bundle, open_bundle

CLASSES = pd.DataFrame({"name": ["a"], "role": ["train"], "red": np.ones(1, np.float32)})


class Server(http.server.SimpleHTTPRequestHandler):
    busy = 0
    """Requests that are to be answered with 503."""

    def do_GET(self) -> None:
        if Server.busy:
            Server.busy -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the tests' output."""


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the folder ``web``."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("SVIP_CACHE", str(tmp_path / "cache"))
    Server.busy = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def write(out: Path, number: int = 0) -> Bundle:
    with BundleWriter(out) as writer:
        writer.add("a.jpg", 0, "train", np.full((2, 2, 3), number, np.uint8))
        return writer.finish(CLASSES, {})


def test_an_address_within_another_one_has_a_folder_of_its_own(web: str, tmp_path: Path) -> None:
    inner = write(tmp_path / "web" / "team" / "cub", 1)
    write(tmp_path / "outer", 2)
    shutil.copytree(tmp_path / "outer", tmp_path / "web" / "team", dirs_exist_ok=True)
    first = open_bundle(f"http://{web}/team/cub")
    second = open_bundle(f"http://{web}/team/")
    assert first.path.is_dir() and second.path.is_dir()
    assert first.image(0).tolist() == inner.image(0).tolist() != second.image(0).tolist()
    assert cached_bundle("s3://team") not in cached_bundle("s3://team/cub").parents
    assert cached_bundle("s3://team/cub") != cached_bundle("s3://other/cub")
    assert cached_bundle("s3://team/cub/") == cached_bundle("s3://team/cub")
    assert cached_bundle("s3://team/cub").name == "cub"


def test_no_password_shows_in_the_cache_or_in_an_error(web: str, tmp_path: Path) -> None:
    write(tmp_path / "web" / "cub")
    (tmp_path / "web" / "bad").mkdir()
    (tmp_path / "web" / "bad" / "bundle.json").write_text("{}")
    assert "hunter2" not in str(open_bundle(f"http://bob:hunter2@{web}/cub").path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if "hunter2" in str(path)]
    with pytest.raises(BundleError, match=r"/bad/bundle\.json: expected format 2") as caught:
        open_bundle(f"http://bob:hunter2@{web}/bad")
    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_busy_for_a_moment_is_asked_again(web: str, tmp_path: Path) -> None:
    bundle = write(tmp_path / "web" / "cub")
    Server.busy = 1
    assert open_bundle(f"http://{web}/cub").sha256 == bundle.sha256
    assert Server.busy == 0


@pytest.mark.parametrize("to", ["folder", "http://bob:hunter2@host/cub", "https://host/cub", "s3://"])
def test_a_bundle_is_pushed_to_buckets_only(to: str) -> None:
    with pytest.raises(DataError, match="expected s3://bucket/prefix") as caught:
        steps.push_bundle("no-such-bundle", to)  # so that anything done before would be another error
    assert "hunter2" not in str(caught.value)


def test_data_are_not_prepared_for_a_web_address() -> None:
    with pytest.raises(DataError, match="expected s3://bucket/prefix") as caught:
        steps.prepare_data("http://bob:hunter2@host/cub", "no-such-preset")
    assert "hunter2" not in str(caught.value)
