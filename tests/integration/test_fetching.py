"""Downloads from servers with faults, web and S3: verified in the end or a clear error, and never a byte too many."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import Faults, FaultyServer, serving
from benchmarks.s3server import KEYS
from svip.data import fetch, pieces, s3, sources
from svip.data.errors import DataError
from svip.data.fetch import archives_of, mirror
from svip.data.pieces import Patience, piece_digests
from svip.data.transfer import Expected, Record, download, local_copy

SIZE = 12_000_000
PIECE = 1 << 19
QUICK = Patience(first=0.01)
SPOILT: dict[str, Faults] = {
    "cut at random": Faults(cut=0.3),
    "503": Faults(unavailable=0.3),
    "503 with Retry-After": Faults(unavailable=0.2, retry_after="0"),
    "stalled": Faults(stall=0.1),
    "another range than asked for": Faults(wrong_range=0.3),
    "other bytes under the right range": Faults(other_bytes=0.08),
    "the range ignored": Faults(ignore_range=0.3),
    "one wrong byte": Faults(wrong_byte=0.08),
    "all of them": Faults(
        cut=0.05, unavailable=0.05, stall=0.03, wrong_range=0.05, other_bytes=0.03, ignore_range=0.05, wrong_byte=0.03
    ),
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes here stand for gigabytes."""
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(pieces, "SAVED_EVERY", 1 << 18)
    monkeypatch.setattr(fetch, "PIECE", PIECE)
    for module in (sources, s3):
        monkeypatch.setattr(module, "CHUNK", 1 << 14)
        monkeypatch.setattr(module, "STALL", 0.5)


@dataclass
class Origin:
    """A place that files are put in and fetched from, through a server with faults."""

    behind: Path | str
    serve_from: Callable[[FaultyServer], str]

    def server(self, faults: Faults | None = None, seed: int = 0) -> FaultyServer:
        return FaultyServer(self.behind, faults or Faults(), seed, stalled=1.0)

    def put(self, name: str, content: bytes) -> None:
        if isinstance(self.behind, Path):
            draft = self.behind / f"{name}.draft"
            draft.write_bytes(content)
            os.replace(draft, self.behind / name)
        else:
            client = s3.session().client("s3", endpoint_url=self.behind)
            client.put_object(Bucket="data", Key=name, Body=content)


@pytest.fixture(params=["web", "s3"])
def origin(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    def use(address: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        s3.client.cache_clear()

    if request.param == "web":
        (tmp_path / "www").mkdir()
        yield Origin(tmp_path / "www", lambda server: server.address)
        return
    weed = request.getfixturevalue("weed")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    use(weed)
    if "data" not in {bucket["Name"] for bucket in s3.client().list_buckets()["Buckets"]}:
        s3.client().create_bucket(Bucket="data")

    def serve_from(server: FaultyServer) -> str:
        use(server.address)
        return "s3://data"

    yield Origin(weed, serve_from)
    s3.client.cache_clear()


def content(seed: int = 0, size: int = SIZE) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def expected(data: bytes, each_piece: bool = True) -> Expected:
    each = [hashlib.sha256(data[start : start + PIECE]).hexdigest() for start in range(0, len(data), PIECE)]
    return Expected(size=len(data), sha256=hashlib.sha256(data).hexdigest(), pieces=tuple(each) if each_piece else ())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("origin", "fault"),
    [("web", fault) for fault in SPOILT]
    # over S3 one that has them all is quick enough for every day
    + [pytest.param("s3", fault, marks=[] if fault == "all of them" else pytest.mark.slow) for fault in SPOILT],
    indirect=["origin"],
)
def test_faults_end_in_the_right_file_for_few_bytes_more(fault: str, origin: Origin, tmp_path: Path) -> None:
    data, target = content(), tmp_path / "out" / "photos.tgz"
    origin.put("photos.tgz", data)
    with serving(origin.server(SPOILT[fault], seed=1)) as server:
        download([f"{origin.serve_from(server)}/photos.tgz"], target, expected(data), patience=QUICK)
    assert target.read_bytes() == data
    assert files(target.parent) == [".photos.tgz.lock", "photos.tgz", "photos.tgz.json"]
    assert server.struck > 0, server.requests
    assert server.sent <= 1.2 * SIZE


def test_a_wrong_byte_that_only_the_whole_checksum_shows_leaves_nothing(origin: Origin, tmp_path: Path) -> None:
    data, target = content(), tmp_path / "out" / "photos.tgz"
    origin.put("photos.tgz", data)
    with serving(origin.server(Faults(wrong_byte=1.0))) as server, pytest.raises(DataError, match="sha256 is .*expec"):
        download([f"{origin.serve_from(server)}/photos.tgz"], target, expected(data, each_piece=False))
    assert files(target.parent) == [".photos.tgz.lock"]
    assert server.sent <= 1.1 * SIZE


def test_a_server_that_stays_broken_is_an_error_that_keeps_what_came(origin: Origin, tmp_path: Path) -> None:
    data, target = content(), tmp_path / "out" / "photos.tgz"
    origin.put("photos.tgz", data)
    with serving(origin.server()) as server:
        address = f"{origin.serve_from(server)}/photos.tgz"
        broken = Faults(cut=1.0)

        def break_down() -> None:
            server.faults = Faults(wrong_range=1.0)

        server.faults, server.at_bytes = broken, (SIZE // 2, break_down)
        with pytest.raises(DataError, match=r"bytes are kept: the same command goes on.*\n.*asked for bytes"):
            download([address], target, expected(data), patience=Patience(first=0.01, attempts=3))
        assert files(target.parent) == [".photos.tgz.lock", ".photos.tgz.part", ".photos.tgz.part.json"]
        server.faults, before = Faults(), server.sent
        download([address], target, expected(data))
    assert target.read_bytes() == data
    assert server.sent - before <= 0.6 * SIZE


def test_a_file_that_changes_on_the_way_is_fetched_anew(
    origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, target = content(1), content(2, SIZE + 1), tmp_path / "photos.tgz"
    origin.put("photos.tgz", old)
    with serving(origin.server()) as server:
        address = f"{origin.serve_from(server)}/photos.tgz"
        server.at_bytes = (SIZE // 10, lambda: origin.put("photos.tgz", new))
        download([address], target, patience=QUICK)
    assert target.read_bytes() == new
    assert "changed while it was being fetched; starting anew" in caplog.text


@pytest.mark.parametrize("origin", ["web"], indirect=True)
def test_a_killed_process_loses_little(origin: Origin, tmp_path: Path) -> None:
    data, target = content(), tmp_path / "out" / "photos.tgz"
    origin.put("photos.tgz", data)
    with serving(origin.server()) as server:
        address = f"{origin.serve_from(server)}/photos.tgz"
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, address, str(target), str(PIECE)])

        def kill() -> None:
            time.sleep(0.5)  # many times what the note of what is there takes
            process.kill()

        server.at_bytes = (SIZE * 6 // 10, kill)
        assert process.wait() == -9
        assert not target.exists()
        download([address], target, expected(data))
    assert target.read_bytes() == data
    assert server.sent <= 1.2 * SIZE


SCRIPT = """
import sys
from pathlib import Path
from svip.data import pieces, s3, sources, transfer
pieces.PIECE, pieces.SAVED_EVERY, s3.CHUNK, sources.CHUNK = int(sys.argv[3]), 1 << 18, 1 << 14, 1 << 14
transfer.download([sys.argv[1]], Path(sys.argv[2]))
"""


def test_two_processes_fetch_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STALL", 60.0)
    data, target = content(), tmp_path / "photos.tgz"
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "photos.tgz").write_bytes(data)
    second_waits = threading.Event()
    with serving(FaultyServer(tmp_path / "www", Faults())) as server:

        def hold() -> None:
            second_waits.wait(60)

        server.at_bytes = (SIZE // 2, hold)
        address = f"{server.address}/photos.tgz"
        first = threading.Thread(target=download, args=([address], target))
        first.start()
        command = [sys.executable, "-c", SCRIPT, address, str(target), str(PIECE)]
        second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert second.stderr
        assert "another process is at work on" in second.stderr.readline()
        second_waits.set()
        first.join()
        assert second.wait() == 0
    assert target.read_bytes() == data
    assert server.sent == SIZE + 1  # and the byte that was asked for to learn its size


def test_a_server_without_ranges_or_length_is_read_in_one_stream(tmp_path: Path) -> None:
    data = content()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.bin").write_bytes(data)
    with serving(FaultyServer(tmp_path / "www", Faults(ignore_range=1.0, cut=0.5), seed=1)) as server:
        download([f"{server.address}/a.bin"], tmp_path / "a.bin", patience=QUICK)
    assert (tmp_path / "a.bin").read_bytes() == data


def test_a_mirror_is_filled_and_used_through_faults(origin: Origin, tmp_path: Path) -> None:
    root, archive = tmp_path / "data", archives_of("xlsa17")[0]
    place = root / "archives" / archive.name
    place.parent.mkdir(parents=True)
    with zipfile.ZipFile(place, "w") as file:
        for path in archive.holds:
            file.writestr(path, content(size=300_000))
    with serving(origin.server(Faults(unavailable=0.1, cut=0.1), seed=1)) as server:
        address = origin.serve_from(server)
        to = address if address.startswith("s3:") else str(tmp_path / "www")
        assert mirror("xlsa17", root, f"{to}/team") == [archive.name]
        assert mirror("xlsa17", root, f"{to}/team") == []
        there = fetch.fetch("xlsa17", tmp_path / "other", f"{address}/team", discard_archives=True)
    assert [each.complete for each in there] == [True]
    assert (tmp_path / "other" / archive.holds[3]).read_bytes() == content(size=300_000)
    assert files(tmp_path / "other" / "archives") == [".xlsa17.zip.lock", "xlsa17.zip.json"]


def test_large_files_go_up_in_parts_that_are_repeated(
    weed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "PART", 5 << 20)  # the smallest that S3 allows
    (tmp_path / "a.bin").write_bytes(content(size=12 << 20))
    with serving(FaultyServer(weed, Faults(unavailable=0.2, cut=0.2), seed=2)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
        s3.client.cache_clear()
        s3.client().create_bucket(Bucket="large")
        told: list[int] = []
        s3.upload(tmp_path / "a.bin", "s3://large/a.bin", told.append)
        server.faults = Faults()
        found = s3.client().get_object(Bucket="large", Key="a.bin")
        assert found["ETag"].endswith('-3"')  # an object of three parts
        assert found["Body"].read() == content(size=12 << 20)
    s3.client.cache_clear()
    assert server.struck > 0
    assert sum(told) == 12 << 20


def test_local_copy_fetches_once_and_again_when_the_file_has_changed(origin: Origin, tmp_path: Path) -> None:
    origin.put("words.txt", b"one 1\n")
    with serving(origin.server()) as server:
        address = f"{origin.serve_from(server)}/words.txt"
        copy = local_copy(address, tmp_path / "cache")
        assert (copy.name, copy.read_bytes()) == ("words.txt", b"one 1\n")
        before = server.sent
        assert local_copy(address, tmp_path / "cache") == copy
        assert server.sent <= before + 1
        origin.put("words.txt", b"two 2 2\n")
        assert local_copy(address, tmp_path / "cache").read_bytes() == b"two 2 2\n"
    server.server_close()
    assert local_copy(address, tmp_path / "cache").read_bytes() == b"two 2 2\n"  # out of reach: the copy serves


def test_a_changed_file_is_fetched_once_by_many_and_the_old_copy_serves_until_then(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    origin = Origin(tmp_path / "www", lambda server: server.address)
    origin.put("words.txt", b"old")
    old, new, cache = b"old", content(), tmp_path / "cache"
    with serving(origin.server()) as server:
        address = f"{server.address}/words.txt"
        copy = local_copy(address, cache)
        origin.put("words.txt", new)
        meanwhile: list[bytes] = []
        before = server.sent
        server.at_bytes = (SIZE // 2, lambda: meanwhile.append(copy.read_bytes()))
        with ThreadPoolExecutor(6) as pool:
            copies = list(pool.map(lambda _: local_copy(address, cache), range(6)))
    assert meanwhile == [old]
    assert copies == [copy] * 6
    assert copy.read_bytes() == new
    assert server.sent - before <= SIZE + 12  # and a byte for each look at its size


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "access denied .*check the credentials"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no S3 credentials found; set AWS_ACCESS_KEY_ID"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "http://127.0.0.1:9 can't be reached.*check AWS_ENDPOINT_URL"),
        ({}, "there is no bucket nobodys at http://127.0.0.1"),
    ],
)
def test_what_is_wrong_with_s3_is_said_with_what_to_do(
    settings: dict[str, str], reason: str, weed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL_S3": weed, "AWS_EC2_METADATA_DISABLED": "true", **settings}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no keys of the user's own
    s3.client.cache_clear()
    s3.session.cache_clear()
    (tmp_path / "a").write_bytes(b"a")
    try:
        with pytest.raises(DataError, match=reason) as error:
            s3.upload(tmp_path / "a", "s3://nobodys/a")
    finally:
        s3.client.cache_clear()
        s3.session.cache_clear()
    assert "secret" not in str(error.value)


def test_the_record_of_a_file_is_what_a_later_download_must_match(origin: Origin, tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    origin.put("a.bin", b"first")
    with serving(origin.server()) as server:
        address = f"{origin.serve_from(server)}/a.bin"
        record = download([address], target)
        assert record.sha256 == hashlib.sha256(b"first").hexdigest()
        assert Record.read(target) == record
        target.unlink()
        origin.put("a.bin", b"other")
        with pytest.raises(DataError, match="a.bin.json"):
            download([address], target)
    assert not target.exists()
    assert json.loads((tmp_path / "a.bin.json").read_text())["size"] == 5


def test_piece_digests_are_those_of_the_pieces(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content())
    assert tuple(piece_digests(tmp_path / "a")) == expected(content()).pieces
