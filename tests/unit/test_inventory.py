"""What `svip datasets` knows: the catalog, and what lies under a root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from svip.data.catalog import CATALOG, PACKAGES, photo_folder
from svip.data.errors import DataError
from svip.data.inventory import inventory


@pytest.mark.parametrize(
    ("name", "images", "seen", "unseen", "attributes"),
    [
        ("cub", 11788, 150, 50, 312),
        ("awa2", 37322, 40, 10, 85),
        ("sun", 14340, 645, 72, 102),
        ("apy", 15339, 20, 12, 64),
    ],
)
def test_data_sets_have_the_published_counts(name: str, images: int, seen: int, unseen: int, attributes: int) -> None:
    (entry,) = [entry for entry in inventory(Path("/nowhere")) if entry["name"] == name]
    assert (entry["images"], entry["classes"], entry["attributes"]) == (images, seen + unseen, attributes)
    assert (entry["seen_classes"], entry["unseen_classes"]) == (seen, unseen)
    assert entry["here"]["photos"] == 0 and entry["here"]["proposed_split"] is None
    assert set(entry["here"]["archives"].values()) == {"missing"}
    assert entry["archives"][-1]["name"] == "xlsa17.zip"  # one fetch brings the splits too


def test_every_archive_can_be_fetched_and_recognised() -> None:
    for package in PACKAGES.values():
        assert package.archives and package.licence and package.citation, package.name
        for archive in package.archives:
            assert archive.holds and all(url.startswith(("https://", "http://")) for url in archive.urls)
            assert all(url.endswith(archive.name) for url in archive.urls)
            assert archive.md5 is None or re.fullmatch(r"[0-9a-f]{32}", archive.md5)
            assert archive.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
    of_name = {archive.name: archive for package in PACKAGES.values() for archive in package.archives}
    assert all(of_name[archive.name] == archive for package in PACKAGES.values() for archive in package.archives)


def test_archives_and_photos_under_the_root_are_found(tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "SUNAttributeDB.tar.gz").touch()
    for path in ("cub/CUB_200_2011/images/001.A/a.jpg", "cub/CUB_200_2011/images/002.B/b.JPG", "cub/attributes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    here = {entry["name"]: entry["here"] for entry in inventory(tmp_path)}
    assert here["cub"] == {
        "archives": {"CUB_200_2011.tgz": "content found, not checked", "xlsa17.zip": "missing"},
        "photos": 2,
        "proposed_split": None,
    }
    assert here["sun"]["archives"]["SUNAttributeDB.tar.gz"] == "archive found, not checked"


def test_the_wrong_sun_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "SUN397").mkdir()
    with pytest.raises(DataError, match="SUN397 is another data set: .*SUNAttributeDB_Images"):
        photo_folder(CATALOG["sun"], tmp_path)
