"""A model over images of a bundle: attribute predictions and selections, or frozen features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from svip.config import Config, ConfigError
from svip.data.bundle import Bundle
from svip.data.images import EpochBatches, ImageDataset, loader
from svip.models.svip import SVIP
from svip.training import distributed


@dataclass(frozen=True)
class Predictions:
    """What a model says of n images, in the order of their rows."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    """Class ids of the bundle, [n]."""
    attributes: Tensor
    """a_hat, float32 [n, A], on the CPU."""
    selected: NDArray[np.bool_]
    """Selected groups, [n, G]."""

    def scores(self, model: SVIP, class_attributes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Eq. 11's logits [n, C] for class attributes [C, A]."""
        matrix = torch.from_numpy(class_attributes)
        scores: NDArray[np.float32] = model.class_scores(self.attributes, matrix).numpy()
        return scores


def distinctions(classes: NDArray[np.float32], among: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each class [C, A] has of the attributes and the classes ``among`` [K, A] lack on average, [C, A].

    At unit length, as in Eq. 11: a_hat times a row says how much each attribute speaks for that class, and sums to the
    lead of its cosine over the mean one (times the length of a_hat).
    """
    own, others = (F.normalize(torch.from_numpy(matrix)) for matrix in (classes, among))
    return (own - others.mean(0)).numpy()


def deciding(a_hat: NDArray[np.float32], distinctive: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The attributes of a_hat [..., A] that speak most for a class with these distinctions [..., A]: [..., count]."""
    order: NDArray[np.int64] = np.argsort(-a_hat * distinctive, axis=-1, kind="stable")[..., :count]
    return order


def choose_device(name: str) -> torch.device:
    """The device that ``train.device`` names; auto takes CUDA where there is one.

    Several processes take a GPU each; ConfigError where there are fewer, or one is named.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.world() == 1 or name == "cpu":
        return torch.device(name)
    if name != "cuda":
        raise ConfigError(f"train.device={name}: expected cuda or auto, for each process takes a GPU of its own")
    number, found = distributed.local_rank(), torch.cuda.device_count()
    if number >= found:
        raise ConfigError(f"process {number + 1} of this machine finds {found} GPUs; start as many processes as GPUs")
    return torch.device("cuda", number)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where ``train.precision`` asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def predict(model: SVIP, config: Config, bundle: Bundle, rows: NDArray[np.int64], label: str) -> Predictions:
    """Attribute predictions of the test views of those images; a progress bar is called ``label``.

    Several processes share the images, and each gets all predictions.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    attributes, selected, labels = [], [], []
    for images, classes in _batches(config, bundle, rows, label):
        with autocast(config, device):
            prediction = model.predict(images.to(device, non_blocking=True))
        attributes.append(prediction.attributes.cpu())
        selected.append(prediction.selected.cpu())
        labels.append(classes)
    model.train(training)
    found = _gathered([torch.cat(labels), torch.cat(attributes), torch.cat(selected)], len(rows))
    return Predictions(rows, found[0], torch.from_numpy(found[1]), found[2])


@torch.no_grad()
def frozen_features(
    model: SVIP, config: Config, bundle: Bundle, rows: NDArray[np.int64], patches: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features of a plain pass over the test views, and class ids [n].

    The class token [n, D]; with ``patches`` the mean merged group stands behind it, [n, D + E].
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    features, labels = [], []
    for images, classes in _batches(config, bundle, rows, "features"):
        with autocast(config, device):
            tokens = model.backbone.encode(model.backbone.embed(model.normalize(images.to(device))))
        row = tokens[:, 0]
        if patches:
            row = torch.cat([row, tokens[:, model.backbone.prefix :][:, model.index].mean(1).flatten(1)], 1)
        features.append(row.float().cpu())
        labels.append(classes)
    model.train(training)
    found = _gathered([torch.cat(features), torch.cat(labels)], len(rows))
    return found[0], found[1]


def _batches(config: Config, bundle: Bundle, rows: NDArray[np.int64], label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and class ids of this process's share of the rows."""
    own = rows[distributed.share(len(rows))]
    dataset = ImageDataset(bundle, own, config.data, train=False, seed=0)
    order = EpochBatches(len(own), config.evaluation.batch_size, seed=0, epoch=0, shuffle=False)
    batches = loader(dataset, order, config.train.workers)
    for images, classes, _ in tqdm(batches, desc=label, leave=False, disable=not distributed.is_main()):
        yield images, classes


def _gathered(own: Sequence[Tensor], count: int) -> list[NDArray[Any]]:
    """What all processes found for their shares of ``count`` rows, in the order of the rows."""
    parts = distributed.all_gather([tensor.numpy() for tensor in own])
    return [distributed.merge(arrays, count) for arrays in zip(*parts, strict=True)]
