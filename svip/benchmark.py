"""How far a training step and inference are from their floor: plain timm passes of the same backbone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from svip.config import load_config
from svip.evaluation.inference import autocast, choose_device
from svip.models.svip import SVIP
from svip.training.loop import train_step
from svip.training.optim import build_optimizer

ATTRIBUTES, CLASSES, WORD_SIZE = 312, 150, 300
"""Sizes of CUB's heads."""


def compare(preset: str, overrides: Sequence[str], rounds: int) -> list[tuple[str, float, float]]:
    """(what, seconds of ours, seconds of the floor) on random images, medians of ``rounds`` taken in turn.

    The floor of a training step is two plain passes forward and backward with the same trainable parameters, loss
    and optimiser; that of inference one plain pass. Both include the upload and normalisation of uint8 images.
    """
    config = load_config(preset, [*overrides, "model.weights=none"])
    device = choose_device(config.train.device)
    model = SVIP(config.model, config.data.image_size, torch.randn(ATTRIBUTES, WORD_SIZE)).to(device)
    plain = SVIP(config.model, config.data.image_size, torch.randn(ATTRIBUTES, WORD_SIZE)).to(device).backbone
    head = nn.Linear(plain.width, CLASSES).to(device)
    for backbone in (model.backbone, plain):
        backbone.set_trainable(True)
    optimizer = build_optimizer(model, config.optim)
    plain_optimizer = AdamW([*plain.parameters(), *head.parameters()], lr=config.optim.lr)
    side = config.data.image_size
    images = torch.randint(0, 256, (config.optim.batch_size, 3, side, side), dtype=torch.uint8)
    targets = torch.randint(0, CLASSES, (len(images),), device=device)
    seen = torch.rand(CLASSES, ATTRIBUTES, device=device)

    def plain_logits() -> Tensor:
        with autocast(config, device):
            tokens = plain.vit.forward_features(model.normalize(images.to(device)))
            logits: Tensor = head(tokens[:, 0])
        return logits.float()

    def plain_step() -> None:
        loss = torch.nn.functional.cross_entropy(plain_logits(), targets)
        loss = loss + torch.nn.functional.cross_entropy(plain_logits(), targets)
        plain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()

    def our_step() -> None:
        model.train()
        train_step(model, optimizer, config, images.to(device), targets, seen)

    def our_inference() -> None:
        model.eval()
        with autocast(config, device):
            model.predict(images.to(device))

    @torch.no_grad()
    def plain_inference() -> None:
        plain_logits()

    step, step_floor = _medians(our_step, plain_step, rounds, device)
    inference, inference_floor = _medians(our_inference, plain_inference, rounds, device)
    return [("training step (two passes)", step, step_floor), ("inference (one pass)", inference, inference_floor)]


def _medians(
    first: Callable[[], None], second: Callable[[], None], rounds: int, device: torch.device
) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):  # in turn, so that both see the same machine; the first round warms up
        for run, record in zip((first, second), times, strict=True):
            _synchronize(device)
            started = time.perf_counter()
            run()
            _synchronize(device)
            if turn:
                record.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
