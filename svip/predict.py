"""What a trained model says of any photo: classes (also new ones, described by their attributes), and why.

``Predictor.load("run")("bird.jpg")`` prepares the photo as the bundle does and scores it as evaluation does.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from svip.config import Config
from svip.data.errors import DataError
from svip.data.images import square
from svip.data.new_classes import parse_new_classes
from svip.data.photos import decode, upright
from svip.evaluation.calibration import ranking
from svip.evaluation.inference import autocast, choose_device, deciding, distinctions
from svip.models.svip import SVIP, Prediction
from svip.training.checkpoint import load_model, read_classes, read_info, write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Photo = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A path, an encoded file's bytes, a PIL image, or RGB pixels uint8 [H, W, 3]."""
ATTRIBUTES_NAMED = 3
"""How many attributes are given as the reason for a class."""


@dataclass(frozen=True)
class Evidence:
    """An attribute that speaks for a class."""

    name: str
    value: float
    """As predicted, of a_hat."""
    patch: tuple[int, int] | None
    """Row and column (from 0) of the selected group with its highest value; None when no patches are read, or when
    it speaks by its absence (a value below 0)."""


@dataclass(frozen=True)
class RankedClass:
    """A candidate class of an image."""

    name: str
    score: float
    """Calibrated: gamma is off the seen classes' scores."""
    share: float
    """Softmax of the scores over all candidates, 0 to 1."""
    attributes: list[Evidence]
    """What speaks most for it, the strongest first."""


@dataclass(frozen=True)
class Answer:
    """What the model says of one image."""

    image: str
    """Its path, or its place among the images."""
    classes: list[RankedClass]
    """The best first."""
    selected: NDArray[np.bool_]
    """Selected groups, [h, w]."""
    view: NDArray[np.uint8]
    """The image as the model saw it, [S, S, 3]."""

    def overlay(self) -> Figure:
        """The view with unselected groups hatched, and the patches of the first class's attributes numbered."""
        from svip.evaluation.figures import example_tile  # a server draws nothing, and so needs no matplotlib

        return example_tile(self.view, self.selected, patches=[e.patch for e in self.classes[0].attributes])

    def to_dict(self) -> dict[str, Any]:
        """All of it but the pixels, ready for JSON; ``selected`` as rows and columns of groups."""
        classes = [asdict(ranked) for ranked in self.classes]
        return {"image": self.image, "classes": classes, "selected": np.argwhere(self.selected).tolist()}


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model with the classes that it chooses among."""

    model: SVIP
    config: Config
    gamma: float
    known: pd.DataFrame
    """The checkpoint's classes: name, role, one column an attribute."""
    candidates: pd.DataFrame
    """The classes to choose among, with the same columns; seen ones are those whose role is not test_unseen."""

    @classmethod
    def load(cls, folder: Path | str, classes: Path | str | None = None, with_known: bool = False) -> Predictor:
        """The predictor of a checkpoint folder, among its own classes or those of the CSV file ``classes``.

        ``with_known`` puts the new classes beside the checkpoint's own. CheckpointError or DataError.
        """
        model, config, info = load_model(Path(folder))
        known = read_classes(Path(folder), info["attributes"])
        # what was trained on a GPU is used wherever there is one
        device = choose_device("cpu" if config.train.device == "cpu" else "auto")
        predictor = cls(model.to(device), config, info["gamma"] or 0.0, known, known)
        return predictor.among(Path(classes).read_bytes(), str(classes), with_known) if classes else predictor

    def among(self, table: bytes, source: str = "classes", with_known: bool = False) -> Predictor:
        """The same model choosing among new classes: the content of a CSV file, which errors call ``source``."""
        new = parse_new_classes(table, list(self.known.columns[2:]), source)
        if not with_known:
            return replace(self, candidates=new)
        if both := sorted(set(new["name"]) & set(self.known["name"])):
            raise DataError(f"{source}: the checkpoint has classes of these names already: {', '.join(both)}; rename")
        return replace(self, candidates=pd.concat([self.known, new], ignore_index=True))

    @torch.inference_mode()
    def __call__(self, *images: Photo, top: int = 5) -> list[Answer]:
        """The ``top`` classes of each image. DataError names all images that can't be read, before any is scored."""
        if top < 1:
            raise ValueError(f"top={top}: expected at least 1")
        names = [str(image) if isinstance(image, str | Path) else f"image {n}" for n, image in enumerate(images, 1)]
        views = self._views(names, images)
        matrix = _matrix(self.candidates)
        distinctive = distinctions(matrix, _matrix(self.known))  # [C, A]
        seen = (self.candidates["role"] != "test_unseen").to_numpy()
        device, size = next(self.model.parameters()).device, self.config.evaluation.batch_size
        grid = self.model.group_grid
        answers = []
        for start in range(0, len(views), size):
            batch = np.stack([view.transpose(2, 0, 1) for view in views[start : start + size]])  # [B, 3, S, S]
            with autocast(self.config, device):
                prediction = self.model.predict(torch.from_numpy(batch).to(device))
            attributes, selected = prediction.attributes.cpu(), prediction.selected.cpu()
            scores = self.model.class_scores(attributes, torch.from_numpy(matrix)).numpy() - self.gamma * seen  # [B, C]
            for k, view in enumerate(views[start : start + size]):
                best = ranking(scores[k], seen)[:top]
                shares = np.exp(scores[k] - scores[k].max())
                patches = _patches(prediction, k, grid)
                classes = [
                    RankedClass(
                        str(self.candidates["name"].iloc[c]),
                        float(scores[k, c]),
                        float(shares[c] / shares.sum()),
                        self._reasons(attributes[k].numpy(), distinctive[c], patches),
                    )
                    for c in best
                ]
                answers.append(Answer(names[start + k], classes, selected[k].reshape(grid).numpy(), view))
        return answers

    def _reasons(
        self, a_hat: NDArray[np.float32], distinctive: NDArray[np.float32], patches: list[tuple[int, int]] | None
    ) -> list[Evidence]:
        """The attributes that speak most for a class: of a_hat [A], its distinctions [A] and their patches [A]."""
        decided = deciding(a_hat, distinctive, ATTRIBUTES_NAMED)
        names = self.known.columns[2:]
        shown = [patches[a] if patches and a_hat[a] > 0 else None for a in decided]
        return [Evidence(str(names[a]), float(a_hat[a]), patch) for a, patch in zip(decided, shown, strict=True)]

    def _views(self, names: Sequence[str], images: Sequence[Photo]) -> list[NDArray[np.uint8]]:
        data, views, unreadable = self.config.data, [], []
        for name, image in zip(names, images, strict=True):
            try:
                views.append(square(_stored(image, data.store_size), data.image_size, data.test_view))
            except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error ...
                unreadable.append(f"{name} ({getattr(error, 'strerror', None) or error})")
        if unreadable:
            named = "".join(f"\n  {image}" for image in unreadable)
            raise DataError(f"{len(unreadable)} of {len(images)} images can't be read:{named}")
        return views


def write_overlays(answers: Sequence[Answer], out: Path) -> list[Path]:
    """Each answer's overlay as NAME_overlay.png in the folder ``out``, numbered where a name comes again."""
    out.mkdir(parents=True, exist_ok=True)
    files, times = [], Counter[str]()
    for answer in answers:
        stem = Path(answer.image).stem
        times[stem] += 1
        again = f"_{times[stem]}" if times[stem] > 1 else ""
        files.append(out / f"{stem}_overlay{again}.png")
        write_atomically(files[-1], partial(answer.overlay().savefig, format="png", dpi=200))
    return files


def write_template(checkpoint: Path, file: Path) -> None:
    """An empty CSV file with the columns that new classes need; FileExistsError where ``file`` is one already."""
    if file.exists():
        raise FileExistsError(f"{file} is there already; give another file to --template")
    columns = read_classes(checkpoint, read_info(checkpoint)["attributes"]).columns.drop("role")
    write_text(file, pd.DataFrame(columns=columns).to_csv(index=False))


def _stored(image: Photo, store_size: int) -> NDArray[np.uint8]:
    """The image as a bundle would store it, uint8 [H, W, 3]."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected RGB pixels uint8 [H, W, 3], found {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return upright(image, store_size)
    return decode(io.BytesIO(image) if isinstance(image, bytes) else Path(image), store_size)


def _matrix(classes: pd.DataFrame) -> NDArray[np.float32]:
    """The class-attribute matrix, [C, A]."""
    return np.ascontiguousarray(classes.iloc[:, 2:], np.float32)


def _patches(prediction: Prediction, k: int, grid: tuple[int, int]) -> list[tuple[int, int]] | None:
    """Image k's selected group with the highest value of each attribute, as row and column: [A]."""
    if prediction.localization is None:
        return None
    groups, values = prediction.selected[k].nonzero().flatten(), prediction.localization[k]
    if len(values) != len(groups):  # a model that drops the others has only values of the selected groups
        values = values[groups]
    return [divmod(group, grid[1]) for group in groups[values.argmax(0)].tolist()]
