"""A photo's answer equals evaluation's, says why, takes new classes from a CSV, and refuses what it can't use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from svip import cli
from svip.config import load_config
from svip.data.bundle import Bundle
from svip.data.errors import DataError
from svip.data.prepare import pack
from svip.data.splits import Split
from svip.evaluation.evaluate import evaluate
from svip.models.svip import SVIP
from svip.predict import Answer, Evidence, Photo, Predictor, RankedClass, write_overlays, write_template
from svip.training.checkpoint import CheckpointError, load_model, save_model, write_classes

GAMMA = 0.5
NAMES = ["wren", "crow, black", "gull", "tern"]
ATTRIBUTES = ["wing::red", "size::big", "bill, hooked", "tail::long"]
MATRIX = np.array([[1, 0, 0.5, 0], [0, 1, 0, 0.25], [0.5, 0, 0, 1], [0, 0.25, 1, 0]], np.float32)
CLASSES = pd.DataFrame({"name": NAMES, "role": ["train", "val_unseen", "test_unseen", "test_unseen"]}).join(
    pd.DataFrame(MATRIX, columns=ATTRIBUTES)
)


def checkpoint(folder: Path, *overrides: str, sha256: str = "") -> Path:
    """An untrained model of a 4x4 grid of groups, 8 of them selected, that has the classes above."""
    config = load_config(
        "smoke",
        [
            "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}",
            "model.selected_groups=8",
            "model.hidden=8",
            "data.image_size=32",
            "evaluation.eszsl=false",
            "train.device=cpu",
            *overrides,
        ],
    )
    torch.manual_seed(0)
    model = SVIP(config.model, 32, torch.randn(len(ATTRIBUTES), 3))
    folder.mkdir(exist_ok=True)
    save_model(folder, model, config, {"attributes": len(ATTRIBUTES), "gamma": GAMMA, "bundle_sha256": sha256})
    write_classes(folder, CLASSES)
    return folder


def write_photos(folder: Path) -> list[Path]:
    """A wide PNG, a tall JPEG, a JPEG that lies on its side (by EXIF) and a small grey PNG."""
    random = np.random.default_rng(3)
    folder.mkdir(exist_ok=True)
    files = [folder / name for name in ("wide.png", "tall.jpg", "turned.jpg", "grey.png")]
    for file, (height, width) in zip(files, [(50, 90), (77, 41), (40, 60), (36, 37)], strict=True):
        coarse = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if file.stem == "turned" else 1
        (photo.convert("L") if file.stem == "grey" else photo).save(file, exif=exif)
    return files


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("run"))


def csv_of(table: pd.DataFrame) -> bytes:
    return str(table.to_csv(index=False)).encode()


def new_classes(*rows: tuple[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame({"name": [name for name, _ in rows]}).join(
        pd.DataFrame([values for _, values in rows], columns=ATTRIBUTES)
    )


def scores(answer: Answer) -> dict[str, float]:
    return {ranked.name: ranked.score for ranked in answer.classes}


@pytest.mark.parametrize("overrides", [("data.store_size=40",), ("data.store_size=0", "data.test_view=squash")])
def test_a_photo_gets_the_numbers_that_evaluation_gives_it(
    photos: list[Path], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    config = load_config("smoke", ["data.image_size=32", *overrides])
    table = pd.DataFrame(
        {
            "path": [photo.name for photo in photos],
            "class_id": range(4),
            "role": ["test_seen", "test_seen", "test_unseen", "test_unseen"],
        }
    )
    info = {"dataset": "synthetic", "split": "standard", "fold": 1}
    bundle: Bundle = pack(Split(table, CLASSES, [], []), photos[0].parent, config.data, info, tmp_path / "bundle")
    run = checkpoint(tmp_path / "run", *overrides, sha256=bundle.sha256)
    evaluate(run, bundle, tmp_path / "test")
    with np.load(tmp_path / "test" / "predictions.npz") as stored:
        expected = stored["scores"] - GAMMA * np.array([1, 1, 0, 0])
        selected = stored["selected"]

    answers = Predictor.load(run)(*photos)
    found = np.array([[scores(answer)[name] for name in NAMES] for answer in answers])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal([answer.selected.flatten() for answer in answers], selected)
    assert [answer.image for answer in answers] == [str(photo) for photo in photos]
    for answer, row in zip(answers, expected, strict=True):
        assert [ranked.name for ranked in answer.classes] == [NAMES[c] for c in np.argsort(-row)]
        shares = [ranked.share for ranked in answer.classes]
        np.testing.assert_allclose(shares, np.sort(np.exp(row) / np.exp(row).sum())[::-1])


def test_path_bytes_open_photo_and_pixels_give_the_same_answer(folder: Path, photos: list[Path]) -> None:
    turned = photos[2]  # 60 pixels wide as stored, upright 60 high
    pixels = np.asarray(Image.open(turned).convert("RGB").transpose(Image.Transpose.ROTATE_270))
    assert pixels.shape == (60, 40, 3)
    first, *others = Predictor.load(folder)(str(turned), turned, turned.read_bytes(), Image.open(turned), pixels)
    assert [answer.image for answer in others] == [str(turned), "image 3", "image 4", "image 5"]
    for answer in others:
        assert answer.classes == first.classes


@pytest.mark.parametrize(
    "overrides", [(), ("model.contextualize=drop",), ("model.pooling=mean",), ("model.readout=cls",)]
)
def test_the_reasons_are_what_the_image_shows_of_a_class_and_others_lack(
    tmp_path: Path, photos: list[Path], overrides: tuple[str, ...]
) -> None:
    run = checkpoint(tmp_path / "run", *overrides)
    (answer,) = Predictor.load(run)(photos[0])
    model, _, _ = load_model(run)
    prediction = model.predict(torch.from_numpy(answer.view.copy()).permute(2, 0, 1)[None].contiguous())
    a_hat = prediction.attributes[0].tolist()
    groups = [g for g in range(16) if prediction.selected[0, g]]
    assert len(groups) == 8 and [4 * r + c for r, c in np.argwhere(answer.selected).tolist()] == groups
    unit = [[value / sum(v * v for v in row) ** 0.5 for value in row] for row in MATRIX.tolist()]
    placed = 0
    for ranked in answer.classes:
        own = unit[NAMES.index(ranked.name)]
        support = [a_hat[a] * (own[a] - sum(row[a] for row in unit) / 4) for a in range(4)]
        decided = sorted(range(4), key=lambda a: -support[a])[:3]
        assert [evidence.name for evidence in ranked.attributes] == [ATTRIBUTES[a] for a in decided]
        for a, evidence in zip(decided, ranked.attributes, strict=True):
            assert evidence.value == pytest.approx(a_hat[a], rel=1e-5)
            if prediction.localization is None or a_hat[a] < 0:
                assert evidence.patch is None, "none is read, or none shows it"
                continue
            local = prediction.localization[0, :, a].tolist()
            values = dict(zip(groups, local, strict=True)) if len(local) == 8 else {g: local[g] for g in groups}
            best = max(values, key=lambda g: values[g])
            assert evidence.patch == (best // 4, best % 4)
            if model.config.pooling == "max":
                assert values[best] == pytest.approx(evidence.value, rel=1e-5), "where Eq. 10 read it"
            placed += 1
    assert (placed > 0) == (prediction.localization is not None)


def test_new_classes_are_the_only_candidates_and_need_no_gamma(folder: Path, photos: list[Path]) -> None:
    predictor = Predictor.load(folder)
    known = scores(predictor(photos[0])[0])
    # the attributes of the first class on another scale, with the columns the other way round
    table = new_classes(("finch", [7, 0, 3.5, 0]), ("owl", [0, 1, 1, 0]))[["tail::long", "name", *ATTRIBUTES[2::-1]]]
    found = scores(predictor.among(csv_of(table))(photos[0])[0])
    assert set(found) == {"finch", "owl"}
    assert found["finch"] == pytest.approx(known["wren"] + GAMMA, rel=1e-5)


def test_new_classes_beside_the_known_ones_count_as_unseen(folder: Path, photos: list[Path], tmp_path: Path) -> None:
    known = scores(Predictor.load(folder)(photos[0])[0])
    (tmp_path / "new.csv").write_bytes("\ufeff".encode() + csv_of(new_classes(("Häher", [1, 0, 0.5, 0]))))
    predictor = Predictor.load(folder, tmp_path / "new.csv", with_known=True)
    found = scores(predictor(photos[0])[0])
    assert {name: found[name] for name in NAMES} == pytest.approx(known, rel=1e-5)
    assert found["Häher"] == pytest.approx(known["wren"] + GAMMA, rel=1e-5)
    with pytest.raises(DataError, match="classes: the checkpoint has classes of these names already: tern, wren"):
        predictor.among(csv_of(CLASSES.drop(columns="role").iloc[[3, 0]]), with_known=True)


def test_equal_scores_go_to_the_unseen_class_as_in_evaluation(folder: Path, photos: list[Path]) -> None:
    twin = csv_of(new_classes(("twin", [1, 0, 0.5, 0])))
    predictor = replace(Predictor.load(folder), gamma=0.0).among(twin, with_known=True)
    for answer in predictor(*photos):
        names = list(scores(answer))
        assert names.index("twin") == names.index("wren") - 1


HEADER = 'name,wing::red,size::big,"bill, hooked",tail::long\n'


def test_the_largest_attributes_still_give_finite_scores(folder: Path, photos: list[Path]) -> None:
    answer = Predictor.load(folder).among(f"{HEADER}owl,1e15,1e15,1e15,1e15\njay,1,1,1,1".encode())(photos[0])[0]
    assert scores(answer)["owl"] == pytest.approx(scores(answer)["jay"], rel=1e-5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "new.csv: expected a header, and a line for each entry"),
        (HEADER, "new.csv: expected a header, and a line for each entry"),
        (
            'name,wing:red,size::big,"bill, hooked"\nowl,1,1,1',
            "unknown column 'wing:red' (nearest: 'wing::red'); missing column 'wing::red' (nearest: 'wing:red'); "
            "missing column 'tail::long'. `svip predict --template FILE` writes the header",
        ),
        (HEADER.replace("tail::long", "size::big") + "owl,1,1,1,1", "column 'size::big' stands there 2 times; missing"),
        (HEADER.replace("name", "class") + "owl,1,1,1,1", "missing column 'name'"),
        (HEADER + "owl,1,1,1", "line 2: expected 5 cells, found 4"),
        (
            HEADER + "owl,1,1,1,1\n\njay,1,much,,nan",
            "line 4, column 'size::big': expected a number, found 'much'; line 4, column 'bill, hooked': expected a "
            "number, found ''; line 4, column 'tail::long': expected a number, found 'nan'",
        ),
        (HEADER + "owl,1,1,1,1\njay,0,1,1,1\nowl ,1,0,0,1", "line 4: 'owl' is already the class of line 2"),
        (HEADER + ",1,1,1,1", "line 2: the class has no name"),
        (HEADER + "owl,0,0,0.0,0", "line 2: all attributes of 'owl' are 0"),
        (
            HEADER + "owl,1e16,1_0,inf,-1e15",
            "expected a number, found '1e16'; line 2, column 'size::big': expected a num",
        ),
        (HEADER + "owl,1e-50,0,0,0", "line 2: all attributes of 'owl' are 0"),
        (HEADER + "owl,x,x,x,x\n" * 4, "; and 9 more"),
        (HEADER + "H\xe4her,1,1,1,1", "new.csv is not a CSV in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_csv_is_named(folder: Path, table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(DataError) as error:
        Predictor.load(folder, tmp_path / "new.csv")
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "new.csv"))


def test_unreadable_images_are_all_named_before_anything_is_computed(
    folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "cut.jpg").write_bytes(photos[1].read_bytes()[:-400])
    predictor = replace(Predictor.load(folder), model=None)  # type: ignore[arg-type]  # which could compute nothing
    bad: list[Photo] = [tmp_path / "text.jpg", tmp_path / "cut.jpg", tmp_path / "none.jpg", np.zeros((8, 8), np.uint8)]
    with pytest.raises(DataError) as error:
        predictor(photos[0], *bad)
    first, *lines = str(error.value).splitlines()
    assert first == "4 of 5 images can't be read:"
    assert f"{tmp_path / 'text.jpg'} (expected a photo as JPEG" in lines[0]
    assert f"{tmp_path / 'cut.jpg'} (image file is truncated" in lines[1]
    assert lines[2] == f"  {tmp_path / 'none.jpg'} (No such file or directory)"
    assert lines[3] == "  image 5 (expected RGB pixels uint8 [H, W, 3], found uint8 [8, 8])"


def test_no_image_is_no_answer_and_no_class_is_refused(folder: Path, photos: list[Path]) -> None:
    assert Predictor.load(folder)() == []
    with pytest.raises(ValueError, match="top=0: expected at least 1"):
        Predictor.load(folder)(photos[0], top=0)


def test_a_folder_without_classes_loads_and_the_predictor_says_what_to_do(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run")
    (run / "classes.parquet").unlink()
    load_model(run)
    with pytest.raises(
        CheckpointError, match="expected the checkpoint's classes with 4 attributes; copy the file out of the bundle"
    ):
        Predictor.load(run)
    write_classes(run, CLASSES.drop(columns="size::big"))
    with pytest.raises(CheckpointError, match="expected the checkpoint's classes with 4 attributes"):
        Predictor.load(run)


def answer_named(image: str, view: NDArray[np.uint8]) -> Answer:
    patches: list[tuple[int, int] | None] = [(0, 1), None, (1, 0), (0, 1)]
    evidence = [Evidence("a", 1.0, patch) for patch in patches]
    return Answer(image, [RankedClass("x", 1.0, 1.0, evidence)], np.array([[False, True], [True, False]]), view)


def test_the_overlay_frames_and_numbers_the_patches_that_decided(tmp_path: Path) -> None:
    white = np.full((40, 40, 3), 255, np.uint8)
    answers = [answer_named(name, white) for name in ("a/bird.jpg", "b/bird.png", "cat.jpg")]
    figure = answers[0].overlay()
    assert [text.get_text() for text in figure.axes[0].texts] == ["1,4", "3"]
    files = write_overlays(answers, tmp_path / "why")
    assert [file.name for file in files] == ["bird_overlay.png", "bird_overlay_2.png", "cat_overlay.png"]
    assert sorted((tmp_path / "why").iterdir()) == sorted(files), "nothing half-written stays"
    with Image.open(files[0]) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (460, 460, 3)
    quarters = {
        (r, c): pixels[230 * r + 20 : 230 * r + 60, 230 * c + 20 : 230 * c + 210] for r in (0, 1) for c in (0, 1)
    }
    assert all(quarters[place].min() == 255 for place in ((0, 1), (1, 0))), "selected: untouched"
    assert all(quarters[place].mean() < 220 for place in ((0, 0), (1, 1))), "unselected: dimmed"
    yellow = (pixels[:, :, 0] > 240) & (pixels[:, :, 2] < 90)
    assert yellow[4:226, 226:234].any() and not yellow[:226, :226].any()


def test_the_command_prints_tables_or_json_and_writes_overlays(
    folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    options = ["--checkpoint", str(folder), "--top", "2"]
    arguments = ["predict", *map(str, photos[:2]), *options]
    told = CliRunner().invoke(cli.app, [*arguments, "--json", "--out", str(tmp_path / "why")])
    assert told.exit_code == 0
    results = json.loads(told.stdout)
    assert results == json.loads((tmp_path / "why" / "predictions.json").read_text())
    for result, answer in zip(results, Predictor.load(folder)(*photos[:2], top=2), strict=True):
        assert Path(result.pop("overlay")) == tmp_path / "why" / f"{Path(answer.image).stem}_overlay.png"
        assert result == json.loads(json.dumps(answer.to_dict())) and len(result["classes"]) == 2
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert [line for line in lines if line.startswith("/")] == [str(photo) for photo in photos[:2]]
    best = results[0]["classes"][0]
    row = next(line for line in lines if best["name"] in line)
    assert f"{best['score']:.3f}" in row and f"{100 * best['share']:.1f}" in row
    reason = best["attributes"][0]
    row = next(line for line in lines if f"1 │ {reason['name']}" in line)
    assert f"{reason['value']:.2f}" in row and "{}, {}".format(*reason["patch"]) in row


def test_a_template_holds_the_columns_and_overwrites_nothing(folder: Path, photos: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    done = CliRunner().invoke(cli.app, ["predict", "--checkpoint", str(folder), "--template", str(file)])
    assert done.exit_code == 0 and str(file) in done.stdout
    assert file.read_text() == HEADER
    with pytest.raises(FileExistsError, match="is there already"):
        write_template(folder, file)
    done = CliRunner().invoke(cli.app, ["predict", str(photos[0]), "--checkpoint", str(folder), "--template", "x.csv"])
    assert done.exit_code == 2 and "leave out the images" in done.output
    file.write_text(HEADER + "owl,1,0,1,0\n")
    arguments = ["predict", str(photos[0]), "--checkpoint", str(folder), "--classes", str(file), "--json"]
    told = CliRunner().invoke(cli.app, arguments)
    assert [(c["name"], c["share"]) for c in json.loads(told.stdout)[0]["classes"]] == [("owl", 1.0)]


def test_known_classes_beside_new_ones_want_new_ones(folder: Path, photos: list[Path]) -> None:
    done = CliRunner().invoke(cli.app, ["predict", str(photos[0]), "--checkpoint", str(folder), "--with-known"])
    assert done.exit_code == 2 and "--classes" in done.output


def test_the_command_wants_an_image(folder: Path) -> None:
    done = CliRunner().invoke(cli.app, ["predict", "--checkpoint", str(folder)])
    assert done.exit_code == 2 and "give at least one image" in done.output
