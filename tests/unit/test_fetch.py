"""What `svip fetch` and `svip mirror` do with archives, with folders in the place of servers."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from svip.cli.shared import app
from svip.data import catalog, sources
from svip.data import fetch as fetching
from svip.data.archives import extract
from svip.data.catalog import CATALOG, XLSA17, Archive
from svip.data.errors import DataError
from svip.data.fetch import archives_of, fetch, mirror, present
from svip.data.pieces import Patience
from svip.data.prepare import prepare_data
from svip.data.sources import HttpSource, Interrupted, shown
from svip.data.transfer import Expected, Record, download, local_copy


def xlsa17(folder: Path, paths: tuple[str, ...] = XLSA17.holds) -> Path:
    """A folder with an xlsa17.zip that holds these files."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "xlsa17.zip", "w") as archive:
        for path in paths:
            archive.writestr(path, path)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_what_was_fetched_is_not_touched_again_even_without_its_archive(tmp_path: Path) -> None:
    source, root = xlsa17(tmp_path / "source"), tmp_path / "data"
    fetch("xlsa17", root, str(source), discard_archives=True)
    place = root / XLSA17.holds[0]
    before = place.stat()
    (there,) = fetch("xlsa17", root, str(tmp_path / "nowhere"))
    assert place.read_text() == XLSA17.holds[0]
    assert place.stat() == before
    assert names(root / "archives") == ["xlsa17.zip.json"]
    assert (there.complete, there.downloaded) == (True, False)
    assert there.record and there.record.extracted == ["xlsa17"]
    assert there.record.size == (source / "xlsa17.zip").stat().st_size


def test_what_was_lost_is_unpacked_again_from_the_archive_that_is_there(tmp_path: Path) -> None:
    root = tmp_path / "data"
    fetch("xlsa17", root, str(xlsa17(tmp_path / "source")))
    (root / XLSA17.holds[1]).unlink()
    assert [each.complete for each in present("xlsa17", root)] == [False]
    fetch("xlsa17", root, str(tmp_path / "nowhere"))
    assert (root / XLSA17.holds[1]).read_text() == XLSA17.holds[1]


def test_unpacking_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = str(xlsa17(tmp_path / "source")), tmp_path / "data"

    def killed(place: Path, folder: Path, **_: object) -> list[str]:
        extract(place, folder)
        (root / XLSA17.holds[0]).write_text("not yet replaced")
        raise KeyboardInterrupt

    for again in (False, True):  # the second time over what was complete before
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fetching, "extract", killed)
            fetch("xlsa17", root, source, again=again)
        assert [each.complete for each in present("xlsa17", root)] == [False]
        fetch("xlsa17", root, source)
        assert [each.complete for each in present("xlsa17", root)] == [True]
        assert (root / XLSA17.holds[0]).read_text() == XLSA17.holds[0]


def test_what_was_put_there_by_hand_is_used_unchecked_and_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, root = str(xlsa17(tmp_path / "source")), tmp_path / "data"
    for path in XLSA17.holds:
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text("mine")
    (there,) = fetch("xlsa17", root, source, discard_archives=True)
    assert (there.complete, there.record) == (True, None)
    assert "found in" in caplog.text and "not checked; `svip fetch --again` replaces it" in caplog.text
    assert names(root) == ["xlsa17"]
    app(["fetch", "xlsa17", "--root", str(root), "--mirror", source, "--again"], standalone_mode=False)
    assert [(root / path).read_text() for path in XLSA17.holds] == list(XLSA17.holds)


def test_a_mirror_does_not_override_what_is_known_of_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    fetch("xlsa17", root, str(xlsa17(tmp_path / "source")), discard_archives=True)
    fetch("xlsa17", other, str(xlsa17(tmp_path / "forged", (*XLSA17.holds, "xlsa17/more"))))
    mirror("xlsa17", other, str(tmp_path / "mirror"))
    with pytest.raises(DataError, match="its xlsa17.zip is another than the one fetched .* remove .*xlsa17.zip.json"):
        fetch("xlsa17", root, str(tmp_path / "mirror"), again=True)
    assert not (root / "xlsa17/more").exists()
    (known,) = present("xlsa17", other)
    assert known.record
    published = dataclasses.replace(XLSA17, sha256=known.record.sha256)
    package = dataclasses.replace(catalog.PACKAGES["xlsa17"], archives=(published,))
    monkeypatch.setitem(catalog.PACKAGES, "xlsa17", package)
    fetch("xlsa17", root, str(tmp_path / "mirror"), again=True)  # what is published decides
    assert (root / "xlsa17/more").exists()


@pytest.mark.parametrize(
    "notes",
    [
        "[]",
        "{",
        '{"size": 9}',
        '{"size": 9, "sha256": null, "piece": 8388608, "pieces": []}',
        '{"size": "9", "sha256": "SUM", "piece": 8388608, "pieces": []}',
        '{"size": 9, "sha256": "SUM", "piece": 8388608, "pieces": null}',
        '{"size": 9, "sha256": "SUM", "piece": 8388608, "pieces": ["0"]}',
    ],
)
def test_notes_of_a_mirror_that_are_none_are_said_to_be_so(notes: str, tmp_path: Path) -> None:
    source = xlsa17(tmp_path / "source")
    (source / "xlsa17.zip.parts.json").write_text(notes.replace("SUM", "0" * 64))
    with pytest.raises(DataError, match="xlsa17.zip.parts.json does not hold the checksums of an archive; remove it"):
        fetch("xlsa17", tmp_path / "data", str(source))


def test_two_who_mirror_into_one_folder_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, to = tmp_path / "data", tmp_path / "mirror"
    fetch("xlsa17", root, str(xlsa17(tmp_path / "source")))
    copied = []

    def sync(file: int, sync: Callable[[int], None] = os.fsync) -> None:
        monkeypatch.setattr(os, "fsync", before)
        copied.append(mirror("xlsa17", root, str(to)))  # another, while this one's copy has no name yet
        sync(file)

    before = os.fsync
    monkeypatch.setattr(os, "fsync", sync)
    copied.append(mirror("xlsa17", root, str(to)))
    assert copied == [["xlsa17.zip"]] * 2
    assert names(to) == ["xlsa17.zip", "xlsa17.zip.parts.json"]
    assert (to / "xlsa17.zip").read_bytes() == (tmp_path / "source" / "xlsa17.zip").read_bytes()


def test_the_disk_must_hold_what_is_unpacked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(XLSA17, unpacked=1e12)
    package = dataclasses.replace(catalog.PACKAGES["xlsa17"], archives=(large,))
    monkeypatch.setitem(catalog.PACKAGES, "xlsa17", package)
    with pytest.raises(DataError, match="bytes needed to fetch and unpack, .* free; make room"):
        fetch("xlsa17", tmp_path / "data", str(xlsa17(tmp_path / "source")))
    xlsa17(tmp_path / "data" / "archives")  # it is there, and its content still needs room
    with pytest.raises(DataError, match="bytes needed to unpack xlsa17.zip, .* free; make room"):
        fetch("xlsa17", tmp_path / "data", str(tmp_path / "source"))
    for name, content in (("glove.6B", 2_249_862_459), ("glove.840B", 5_646_236_541)):
        (archive,) = archives_of(name)
        assert archive.size and content <= archive.unpacked * archive.size <= 1.02 * content


def test_an_archive_without_what_it_must_hold_is_another_file(tmp_path: Path) -> None:
    source = xlsa17(tmp_path / "source", XLSA17.holds[1:])
    with pytest.raises(DataError, match="holds no xlsa17/data/CUB/att_splits.mat"):
        fetch("xlsa17", tmp_path / "data", str(source))
    assert names(tmp_path / "data") == ["archives"]
    assert names(tmp_path / "data" / "archives") == []
    (there,) = fetch("xlsa17", tmp_path / "data", str(xlsa17(tmp_path / "good")))  # not held against the other
    assert there.complete
    by_hand = xlsa17(tmp_path / "own" / "archives", XLSA17.holds[1:])
    with pytest.raises(DataError, match="holds no xlsa17/data/CUB/att_splits.mat"):
        fetch("xlsa17", tmp_path / "own", str(source))
    assert names(by_hand) == ["xlsa17.zip"]


def test_a_mirror_is_checked_against_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    fetch("xlsa17", root, str(xlsa17(tmp_path / "source")))
    mirror("xlsa17", root, str(tmp_path / "mirror"))
    assert names(tmp_path / "mirror") == ["xlsa17.zip", "xlsa17.zip.parts.json"]
    published = dataclasses.replace(XLSA17, sha256="0" * 64)
    package = dataclasses.replace(catalog.PACKAGES["xlsa17"], archives=(published,))
    monkeypatch.setitem(catalog.PACKAGES, "xlsa17", package)
    with pytest.raises(DataError, match="its xlsa17.zip is not the published one"):
        fetch("xlsa17", tmp_path / "other", str(tmp_path / "mirror"))


def test_an_archive_put_there_by_hand_is_checked_and_used(tmp_path: Path) -> None:
    root = tmp_path / "data"
    xlsa17(root / "archives")
    (there,) = fetch("xlsa17", root, str(tmp_path / "nowhere"))
    assert there.record and there.record.source == "found there"
    with pytest.raises(DataError, match="a.tgz: sha256 is .* expected 000.*remove it"):
        (tmp_path / "a.tgz").write_bytes(b"mine")
        download([], tmp_path / "a.tgz", Expected(sha256="0" * 64))


def test_mirroring_needs_the_archives(tmp_path: Path) -> None:
    root = tmp_path / "data"
    with pytest.raises(DataError, match=f"xlsa17.zip is not there; run `svip fetch xlsa17 --root {root}` first"):
        mirror("xlsa17", root, str(tmp_path / "mirror"))
    source = str(xlsa17(tmp_path / "source"))
    fetch("xlsa17", root, source, discard_archives=True)
    with pytest.raises(DataError, match=f"run `svip fetch xlsa17 --root {root} --again` first, without --discard"):
        mirror("xlsa17", root, str(tmp_path / "mirror"))
    fetch("xlsa17", root, source, again=True)
    assert mirror("xlsa17", root, str(tmp_path / "mirror")) == ["xlsa17.zip"]
    with pytest.raises(DataError, match="https://a.org/x: files can be put on s3://bucket/prefix or into a folder"):
        mirror("xlsa17", tmp_path, "https://a.org/x")


def test_all_are_all_data_sets_with_what_they_share_once() -> None:
    every = archives_of("all")
    assert {archive.name for archive in every} >= {"CUB_200_2011.tgz", "AwA2-data.zip", "xlsa17.zip"}
    assert len({archive.name for archive in every}) == len(every)
    with pytest.raises(DataError, match="there are: cub, "):
        archives_of("cup")


def test_the_next_address_is_tried_and_all_are_named(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"good")
    (tmp_path / "long").write_bytes(b"too long")
    dead, wrong, good = (str(tmp_path / name) for name in ("dead", "long", "good"))
    record = download([dead, wrong, good], tmp_path / "out" / "a", Expected(size=4))
    assert record.source == good
    with pytest.raises(DataError, match="(?s)b could not be fetched:.*dead: there is no such.*long: has 8 bytes, exp"):
        download([dead, wrong], tmp_path / "out" / "b", Expected(size=4))
    assert names(tmp_path / "out") == ["a", "a.json"]


def test_a_disk_too_small_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    with pytest.raises(DataError, match="1,000,000,000,000,000 bytes needed to fetch and unpack, .* free; make room"):
        download([str(tmp_path / "a")], tmp_path / "out" / "a", room=1e12)


def test_a_web_page_in_place_of_a_file_is_a_dead_address(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html>we moved</html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(DataError, match="answers with a web page; the file has moved"):
            download([f"{address}/a.html"], tmp_path / "a")
        with pytest.raises(DataError, match=r"b.tgz: answered 404 \(File not found\)"):
            download([f"{address}/b.tgz"], tmp_path / "b")
        server.shutdown()


def test_no_secret_of_an_address_is_in_a_message() -> None:
    source = HttpSource("http://me:pass@127.0.0.1:9/a.zip?X-Amz-Signature=secret")
    with pytest.raises(Interrupted) as error:
        source.describe()
    assert str(error.value) == "http://127.0.0.1:9/a.zip: the connection was refused"


def test_an_address_is_shown_without_user_password_and_query() -> None:
    assert shown("http://bob:p@w@a.org:80/x/y.zip?sig=1#2") == "http://a.org:80/x/y.zip"
    assert shown("https://a.org?sig=a/b@c") == "https://a.org"
    assert shown("s3://key:secret@team/zsl") == "s3://team/zsl"
    assert shown("/home/bob@a.org/what?/x") == "/home/bob@a.org/what?/x"


def test_no_secret_of_a_mirror_is_in_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mirror").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_address[1]}/mirror"
        secret = f"http://bob:hunter2@{host}/?sig=hunter2"
        with pytest.raises(DataError, match=f"http://{host}/xlsa17.zip: answered 404") as error:
            fetch("xlsa17", tmp_path / "data", secret)
        (tmp_path / "mirror" / "xlsa17.zip.parts.json").write_text("[]")
        with pytest.raises(DataError, match=f"http://{host}/xlsa17.zip.parts.json does not hold") as damaged:
            fetch("xlsa17", tmp_path / "data", secret)
        server.shutdown()
    with pytest.raises(DataError, match=f"http://{host}/: files can be put on") as refused:
        mirror("xlsa17", tmp_path / "data", secret)
    assert "has no xlsa17.zip.parts.json" in caplog.text
    assert "hunter2" not in f"{caplog.text} {error.value} {damaged.value} {refused.value}"


def test_pauses_are_random_bounded_and_no_shorter_than_asked() -> None:
    patience = Patience(first=0.5, longest=30)
    for failures, bound in ((1, 0.5), (2, 1.0), (4, 4.0), (20, 30.0)):
        pauses = [patience.pause(failures, 0) for _ in range(200)]
        assert 0 <= min(pauses) < bound / 4 and bound * 3 / 4 < max(pauses) <= bound
    assert patience.pause(1, 7) >= 7
    assert patience.pause(1, 1e6) <= 60.5


def test_retry_after_is_seconds_or_a_date() -> None:
    assert sources.seconds_asked("120") == 120
    assert sources.seconds_asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert sources.seconds_asked("") == sources.seconds_asked("soon") == 0


def test_a_path_is_its_own_copy(tmp_path: Path) -> None:
    assert local_copy(str(tmp_path / "words.txt")) == tmp_path / "words.txt"


def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="a.json is not a record of a download"):
        Record.read(tmp_path / "a")


def test_the_commands_say_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = xlsa17(tmp_path / "source"), tmp_path / "data"
    app(["fetch", "xlsa17", "--root", str(root), "--mirror", str(source)], standalone_mode=False)
    assert "xlsa17.zip" in capsys.readouterr().out
    app(["mirror", "xlsa17", "--root", str(root), "--to", str(tmp_path / "to")], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"copied to {tmp_path / 'to'}: xlsa17.zip\n")


@pytest.mark.shared
def test_one_command_ends_with_a_bundle(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svip.config import load_config

    (tmp_path / "team").mkdir()
    photos = sorted((shared / "data/cub/CUB_200_2011/images").rglob("*.jpg"))[::10]
    with tarfile.open(tmp_path / "team" / "cub.tgz", "w:gz") as archive:
        for path in (shared / "data/cub/CUB_200_2011").rglob("*"):
            if path.suffix == ".txt" or path in photos:
                archive.add(path, path.relative_to(shared / "data/cub"))
        archive.add(shared / "data/cub/attributes.txt", "attributes.txt")
    with zipfile.ZipFile(tmp_path / "team" / "xlsa17.zip", "w") as zipped:
        for path in (shared / "data/xlsa17").rglob("*"):
            zipped.write(path, path.relative_to(shared / "data"))
    parts = Archive(name="cub.tgz", urls=(), folder="cub", holds=("CUB_200_2011/images", "attributes.txt"))
    spec = dataclasses.replace(CATALOG["cub"], archives=(parts, XLSA17))
    monkeypatch.setitem(CATALOG, "cub", spec)
    monkeypatch.setitem(catalog.PACKAGES, "cub", spec)
    config = load_config("development/cub", [f"data.root={tmp_path / 'data'}", f"data.mirror={tmp_path / 'team'}"])
    config.data.allow_missing, config.data.store_size = True, 32
    bundle = prepare_data(config, tmp_path / "bundle")
    assert len(bundle.split) == len(photos) == 441
    assert "mirror" not in bundle.info["settings"]


def test_what_is_there_of_many_is_mirrored_though_others_are_not(tmp_path: Path) -> None:
    root, to = tmp_path / "data", tmp_path / "mirror"
    fetch("xlsa17", root, str(xlsa17(tmp_path / "source")))
    with pytest.raises(DataError, match=r"CUB_200_2011\.tgz, .*are not there; run .* \(xlsa17\.zip were copied\)"):
        mirror("all", root, str(to))
    assert (to / "xlsa17.zip.parts.json").exists()
