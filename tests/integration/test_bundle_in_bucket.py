"""Bundles pushed to an S3 server and used from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_training import IMAGE_ROLES, write_bundle
from tqdm import tqdm

from benchmarks.s3server import KEYS
from svip import steps
from svip.data import bundle_cache, s3
from svip.data.bundle import Bundle, BundleError, DataError, read_bundle


@pytest.fixture
def bucket(weed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an empty bucket; the cache of this machine is empty too."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL_S3": weed, "SVIP_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    name = request.node.name.replace("_", "-")[:60].strip("-")
    s3.client().create_bucket(Bucket=name)
    yield f"s3://{name}"
    s3.client.cache_clear()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle", IMAGE_ROLES)


def test_a_pushed_bundle_is_fetched_once_and_mapped(bundle: Bundle, bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/bundles/small/"
    assert steps.push_bundle(str(bundle.path), address) == bundle.sha256
    stored = s3.client().list_objects_v2(Bucket=bucket[5:])["Contents"]
    assert {entry["Key"] for entry in stored} == {f"bundles/small/{file.name}" for file in bundle.path.iterdir()}
    fetched = bundle_cache.open_bundle(address)
    folder = bundle_cache.cached_bundle(address)
    assert fetched.path == folder
    assert folder.is_relative_to(tmp_path / "cache")
    assert {file.name for file in folder.iterdir()} == {file.name for file in bundle.path.iterdir()}
    assert not list(folder.parent.glob(".*.part"))
    assert fetched.sha256 == bundle.sha256
    assert fetched.image(5).tolist() == bundle.image(5).tolist()
    inode = (folder / "images.bin").stat().st_ino
    assert bundle_cache.open_bundle(address).path == folder
    assert (folder / "images.bin").stat().st_ino == inode


def test_a_bundle_that_was_pushed_anew_is_fetched_anew(bundle: Bundle, bucket: str, tmp_path: Path) -> None:
    bundle_cache.push_bundle(bundle, bucket)
    bundle_cache.open_bundle(bucket)
    other = write_bundle(tmp_path / "other", IMAGE_ROLES, other_tests=True)
    bundle_cache.push_bundle(other, bucket)
    assert bundle_cache.open_bundle(bucket).sha256 == other.sha256 != bundle.sha256


def test_damage_in_the_bucket_is_noticed_and_nothing_of_it_kept(bundle: Bundle, bucket: str, tmp_path: Path) -> None:
    bundle_cache.push_bundle(bundle, bucket)
    wrong = bytearray((bundle.path / "images.bin").read_bytes())
    wrong[-1] ^= 1
    (tmp_path / "images.bin").write_bytes(wrong)
    s3.upload(tmp_path / "images.bin", f"{bucket}/images.bin")
    with pytest.raises(BundleError, match="the pixels of 1 images are damaged"):
        bundle_cache.open_bundle(bucket)
    s3.upload(bundle.path / "images.bin", f"{bucket}/images.bin")
    assert bundle_cache.open_bundle(bucket).sha256 == bundle.sha256
    assert not list(tmp_path.glob("cache/**/*.part"))


def test_half_a_push_is_no_bundle(bundle: Bundle, bucket: str) -> None:
    s3.upload(bundle.path / "images.bin", f"{bucket}/images.bin")
    with pytest.raises(DataError, match=r"bundle\.json"):
        bundle_cache.open_bundle(bucket)


def test_a_push_that_breaks_off_leaves_no_bundle_and_is_repeated(
    bundle: Bundle, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_cache.push_bundle(bundle, bucket)
    other, upload = write_bundle(tmp_path / "other", IMAGE_ROLES, other_tests=True), s3.upload

    def breaks_off(file: Path, *rest: Any) -> None:
        if file.name == "split.parquet":
            raise KeyboardInterrupt
        upload(file, *rest)

    monkeypatch.setattr(s3, "upload", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        bundle_cache.push_bundle(other, bucket)
    with pytest.raises(s3.Missing, match=r"bundle\.json"):
        bundle_cache.open_bundle(bucket)
    monkeypatch.setattr(s3, "upload", upload)
    bundle_cache.push_bundle(other, bucket)
    assert bundle_cache.open_bundle(bucket).sha256 == other.sha256


def test_progress_of_a_push_is_told_in_bytes(bundle: Bundle, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    monkeypatch.setattr(tqdm, "update", lambda bar, n=1: steps.append(n))
    bundle_cache.push_bundle(bundle, bucket)
    assert sum(steps) == sum(file.stat().st_size for file in bundle.path.iterdir())


@pytest.mark.slow
def test_prepared_data_go_to_the_bucket_and_are_there_the_next_time(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{bucket}/synthetic"
    info = steps.prepare_data(address, "smoke", ["data.store_size=32"])
    assert bundle_cache.open_bundle(address).sha256 == info["sha256"]
    report = steps.embed_attributes(address, str(bundle_cache.cached_bundle(address).with_name("words")), "smoke")
    assert report["missing_words"] == {}
    assert read_bundle(bundle_cache.cached_bundle(address)).sha256 == info["sha256"]
    monkeypatch.setenv("SVIP_CACHE", str(tmp_path / "another machine"))
    assert steps.prepare_data(address, "smoke", ["data.store_size=32"]) == info
    assert not (tmp_path / "another machine").exists()
    changed = steps.prepare_data(address, "smoke", ["data.store_size=32", "data.fold=2"])
    assert changed["sha256"] == bundle_cache.open_bundle(address).sha256 != info["sha256"]
