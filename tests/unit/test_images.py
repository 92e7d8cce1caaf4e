from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from svip.config import DataConfig
from svip.data.bundle import Bundle, BundleWriter
from svip.data.images import EpochBatches, ImageDataset, center, loader, random_crop, resize
from svip.data.photos import decode, short_side


def coordinates(height: int, width: int) -> np.ndarray:
    """Red is the column, green the row, so that a view tells where it was cut."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    classes = pd.DataFrame({"name": ["a", "b"], "role": ["train", "test_unseen"], "red": [0.0, 1.0]})
    with BundleWriter(tmp_path_factory.mktemp("images") / "out") as writer:
        for row in range(40):
            writer.add(f"{row}.jpg", row % 2, "train", coordinates(20, 24))
        return writer.finish(classes, {})


def dataset(
    bundle: Bundle, train: bool, view: str = "center", flip: bool = True, seed: int = 0, first: int = 0
) -> ImageDataset:
    data = DataConfig(image_size=16, train_view=view, test_view="center" if view == "random_crop" else view, flip=flip)
    return ImageDataset(bundle, np.arange(first, 40), data, train, seed)


@pytest.mark.parametrize(
    ("width", "height", "refused"),
    [
        (40, 2, ""),
        (41, 2, "41 x 2 pixels: expected"),
        (2, 41, "no side more than 20 times"),
        (10_000, 8_001, "at most 80 megapixels"),
    ],
)
def test_a_size_that_is_no_photo_s_is_refused_before_it_is_decoded(width: int, height: int, refused: str) -> None:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "png")
    if refused:
        with pytest.raises(ValueError, match=refused):
            decode(file, 8)
    else:
        assert decode(file, 8).shape == (8, 160, 3)


def test_formats_that_need_another_program_are_not_read() -> None:
    postscript = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    assert Image.open(postscript).format == "EPS"
    postscript.seek(0)
    with pytest.raises(UnidentifiedImageError):
        decode(postscript, 8)


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def test_a_photo_of_any_kind_comes_as_upright_rgb() -> None:
    colour = Image.new("RGB", (60, 40), (200, 100, 50))
    cmyk = decode(encoded(colour.convert("CMYK"), "jpeg", quality=100), 20)
    assert np.abs(cmyk.astype(int) - [200, 100, 50]).max() <= 3  # JPEG rounds
    see_through = colour.convert("RGBA")
    see_through.putalpha(0)
    assert (decode(encoded(see_through, "png"), 0) == [200, 100, 50]).all()  # alpha is dropped, as usual in the field
    palette = colour.quantize(4)
    assert (decode(encoded(palette, "png", transparency=0), 0) == [200, 100, 50]).all()
    deep = Image.fromarray(np.full((40, 60), 0x8040, np.uint16))
    assert (decode(encoded(deep, "png"), 0) == 0x80).all()
    upside = coordinates(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: to be turned by 180 degrees
    turned = encoded(Image.fromarray(upside[::-1, ::-1].copy()), "png", exif=exif)
    assert decode(turned, 0).tolist() == upside.tolist()
    with pytest.raises(ValueError, match="mode F"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), 0)


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", bytes(1000), b"\xff\xd8\xff"])
def test_what_is_no_photo_is_called_so(content: bytes) -> None:
    with pytest.raises(UnidentifiedImageError, match="expected a photo as JPEG, PNG"):
        decode(io.BytesIO(content), 8)


def test_half_a_photo_is_an_error() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("jpeg", "png"):
        content = encoded(noise, kind).getvalue()
        with pytest.raises(OSError, match="truncated"):
            decode(io.BytesIO(content[: len(content) // 2]), 8)


def test_center_cuts_the_middle_without_resampling() -> None:
    view = center(coordinates(7, 12), 4)
    assert view.shape == (4, 4, 3)
    assert view[0, :, 0].tolist() == [4, 5, 6, 7]  # (12 - 4) / 2
    assert view[:, 0, 1].tolist() == [1, 2, 3, 4]  # (7 - 4) / 2, rounded down
    exact = coordinates(5, 5)
    assert np.shares_memory(center(exact, 5), exact)
    assert center(exact, 5).shape == (5, 5, 3)


def test_center_enlarges_only_what_is_too_small() -> None:
    assert center(coordinates(10, 30), 16).shape == (16, 16, 3)


def test_resize_averages_over_all_pixels_it_shrinks() -> None:
    image = np.array([[0, 100], [100, 200]], np.uint8)[..., None].repeat(3, axis=2)
    assert resize(image, 1, 1).tolist() == [[[100, 100, 100]]]
    stripes = np.tile(np.array([0, 255], np.uint8), 32)[None, :, None].repeat(64, 0).repeat(3, 2)
    shrunk = resize(stripes, 8, 8)  # without antialiasing all would be 0 or 255
    assert shrunk[:, 1:-1].min() > 120
    assert shrunk[:, 1:-1].max() < 136


def test_short_side_keeps_the_aspect() -> None:
    assert short_side(100, 200, 50) == (50, 100)
    assert short_side(500, 333, 224) == (336, 224)  # 336.3, rounded down


def test_training_view_is_mirrored_about_half_of_the_time(bundle: Bundle) -> None:
    views = dataset(bundle, train=True)
    plain = dataset(bundle, train=False)[0, 0][0]
    mirrored = 0
    for epoch in range(10):
        for position in range(40):
            view, _, _ = views[epoch, position]
            turned = torch.equal(view, plain.flip(2))
            assert turned or torch.equal(view, plain)
            mirrored += turned
    assert 160 < mirrored < 240  # 400 throws, mean 200, standard deviation 10


def test_nothing_is_random_without_flip_or_in_evaluation(bundle: Bundle) -> None:
    for views in (dataset(bundle, train=True, flip=False), dataset(bundle, train=False, view="random_crop")):
        view, class_id, row = views[3, 5]
        assert (class_id, row) == (1, 5)
        assert view.dtype == torch.uint8
        assert view[0, 0].tolist() == list(range(4, 20))
        assert view[1, :, 0].tolist() == list(range(2, 18))


def test_squash_shows_the_whole_image(bundle: Bundle) -> None:
    view, _, _ = dataset(bundle, train=False, view="squash")[0, 0]
    assert view.shape == (3, 16, 16)
    assert view[0, 0, 0] <= 1
    assert view[0, 0, -1] >= 22


def test_augmentation_depends_on_seed_epoch_and_row_alone(bundle: Bundle) -> None:
    views = dataset(bundle, train=True, view="random_crop")
    part = dataset(bundle, train=True, view="random_crop", first=7)
    assert part[4, 0][2] == views[4, 7][2] == 7
    assert torch.equal(part[4, 0][0], views[4, 7][0])
    for other in (views[5, 7], views[4, 8], dataset(bundle, train=True, view="random_crop", seed=1)[4, 7]):
        assert not torch.equal(other[0], views[4, 7][0])


def test_random_crops_have_the_published_range_of_area_and_ratio() -> None:
    generator = np.random.default_rng(0)
    image, side = coordinates(250, 250), 64
    areas = []
    for _ in range(300):
        view = random_crop(image, side, generator).astype(int)
        # a crop of n pixels resampled to 64 spans n * 63/64 in coordinates, give or take rounding at both ends
        width = (view[0, -1, 0] - view[0, 0, 0]) * side / (side - 1)
        height = (view[-1, 0, 1] - view[0, 0, 1]) * side / (side - 1)
        areas.append(width * height / 250**2)
        assert 0.71 < width / height < 1.40
    assert min(areas) > 0.07
    assert max(areas) <= 1.03
    assert 0.44 < np.mean(areas) < 0.56  # uniform 0.08-1 has mean 0.54; large ones fit a little less often


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 9))
def test_random_crop_takes_any_shape_of_image(height: int, width: int, seed: int) -> None:
    image = np.full((height, width, 3), 77, np.uint8)
    view = random_crop(image, 8, np.random.default_rng(seed))
    assert view.shape == (8, 8, 3)
    assert (view == 77).all()


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 70),
    batch_size=st.integers(1, 17),
    world=st.integers(1, 4),
    start=st.integers(0, 4),
    shuffle=st.booleans(),
)
def test_ranks_part_each_epoch_and_resume_yields_its_tail(
    count: int, batch_size: int, world: int, start: int, shuffle: bool
) -> None:
    batch_size = max(batch_size, world)
    alone = list(EpochBatches(count, batch_size, 5, 2, shuffle=shuffle))
    ranks = [EpochBatches(count, batch_size, 5, 2, rank, world, shuffle=shuffle) for rank in range(world)]
    assert sorted(position for batch in alone for _, position in batch) == list(range(count))
    for number, whole in enumerate(alone):
        sizes = [rank.sizes(number) for rank in ranks]
        assert all(images == len(whole) for _, images in sizes)
        parts = [list(rank)[number] for rank in ranks]
        assert all(part == whole[:1] for part, (own, _) in zip(parts, sizes, strict=True) if not own), "takes part"
        counted = [item for part, (own, _) in zip(parts, sizes, strict=True) for item in part[:own]]
        assert sorted(counted) == sorted(whole)
    assert {len(rank) for rank in ranks} == {len(alone)}, "all take as many steps"
    for number, rank in enumerate(ranks):
        resumed = EpochBatches(count, batch_size, 5, 2, number, world, start_batch=start, shuffle=shuffle)
        assert list(resumed) == list(rank)[start:]
        assert len(resumed) == len(list(resumed))
        assert len(rank) == len(list(rank))


def test_epoch_order_follows_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [position for batch in EpochBatches(100, 10, seed, epoch) for _, position in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert list(EpochBatches(5, 2, 0, 7, shuffle=False)) == [[(7, 0), (7, 1)], [(7, 2), (7, 3)], [(7, 4)]]


def test_drop_last_gives_all_ranks_equal_batches() -> None:
    ranks = [list(EpochBatches(23, 6, 0, 0, rank, 3, drop_last=True)) for rank in range(3)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[2, 2, 2]] * 3
    with pytest.raises(ValueError, match="rank < world <= batch_size"):
        EpochBatches(10, 2, 0, 0, rank=0, world=3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("view", ["center", "random_crop"])
def test_workers_and_processes_change_no_pixel_and_no_batch(bundle: Bundle, view: str) -> None:
    """A batch of the whole is, for any number of workers and processes, made of the same images in the same views."""
    views = dataset(bundle, train=True, view=view)

    def batches(workers: int, world: int) -> list[dict[int, bytes]]:
        """Of each global batch: row -> pixels."""
        ranks = [loader(views, EpochBatches(40, 16, 3, 2, rank, world), workers) for rank in range(world)]
        return [
            {
                int(row): image.numpy().tobytes()
                for images, _, rows in parts
                for image, row in zip(images, rows, strict=True)
            }
            for parts in zip(*ranks, strict=True)
        ]

    expected = batches(0, 1)
    assert [len(batch) for batch in expected] == [16, 16, 8]
    for workers, world in ((1, 1), (3, 1), (0, 2), (1, 4), (3, 2)):
        assert batches(workers, world) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_collates_in_order_whatever_the_workers(bundle: Bundle, workers: int) -> None:
    views = dataset(bundle, train=True, view="random_crop", first=4)
    batches = EpochBatches(36, 16, 0, 1)
    loaded = list(loader(views, batches, workers))
    assert [tuple(images.shape) for images, _, _ in loaded] == [(16, 3, 16, 16), (16, 3, 16, 16), (4, 3, 16, 16)]
    for (images, class_ids, rows), items in zip(loaded, batches, strict=True):
        assert rows.tolist() == [position + 4 for _, position in items]
        assert class_ids.tolist() == [row % 2 for row in rows.tolist()]
        assert torch.equal(images, torch.stack([views[item][0] for item in items]))
