"""Training: choose epoch and gamma on the validation classes, retrain on trainval, be resumable at any moment."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from svip import losses
from svip.config import Config, ConfigError
from svip.data.bundle import TRAINVAL, Bundle
from svip.data.images import EpochBatches, ImageDataset, loader
from svip.evaluation.calibration import SeenUnseenCurve
from svip.evaluation.inference import autocast, choose_device, predict
from svip.evaluation.metrics import ACCURACIES, published_metrics, zero_shot_metrics
from svip.models.svip import SVIP
from svip.semantics.groups import attribute_groups
from svip.semantics.vectors import vectors_sha256
from svip.training import checkpoint, distributed
from svip.training.optim import build_optimizer, rate_factor, set_rates
from svip.training.probe import probe_heads

log = logging.getLogger(__name__)

Log = Callable[[dict[str, float], int, str, int], None]
"""Receives an epoch's metrics, the epoch (from 1), the phase, and when it ended, in ms since 1970.

The last epoch before a training goes on comes again, with the same time: it may have been lost on the way."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or not a number; the message names the phase, step and images."""


@dataclass(frozen=True)
class Phase:
    """One run over some images. ``select`` trains on train and validates; ``final`` trains on trainval."""

    name: str
    roles: tuple[str, ...]
    class_roles: tuple[str, ...]
    epochs: int
    kept: int = 0
    """The epoch whose weights are the result, where that is not simply the last one."""


@dataclass
class Progress:
    """Where a phase stands; saved with every checkpoint."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Finished steps of the epoch under way."""
    sums: dict[str, float] = field(default_factory=dict)
    """Losses of those steps, summed over images."""
    images: int = 0
    seconds: float = 0.0
    """Time spent training in all."""
    history: list[dict[str, Any]] = field(default_factory=list)
    ended: int = 0
    """When the last epoch of the history did, in ms since 1970."""


def train(
    config: Config,
    bundle: Bundle,
    words: NDArray[np.float32],
    out: Path,
    report: Log,
    saved: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Train into ``out`` (or go on there) and return model.json's content.

    words: attribute vectors float32 [A, V]. Of several processes rank 0 alone reads and writes ``out``, and calls
    ``saved`` when there is a new checkpoint in it. Raises NonFiniteLoss, ConfigError or CheckpointError.
    """
    finished = distributed.on_main(lambda: _begin(config, bundle, words, out))
    if finished:
        return finished
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    if config.train.select:
        select = Phase("select", ("train",), ("train",), config.optim.epochs)
        history = _run_cached(select, config, bundle, words, out, report, saved)
        best = _best(history)
        log.info("chosen on the validation classes: epoch %d, gamma %.3f", best["epoch"], best["val/gamma"])
    kept = best.get("epoch", config.optim.epochs)
    epochs = config.optim.epochs if config.train.published else kept
    final = Phase("final", TRAINVAL, ("train", "val_unseen"), epochs, kept)
    model, progress = run_phase(final, config, bundle, words, out, report, saved)
    info: dict[str, Any] = {
        "epochs": kept,
        "gamma": best.get("val/gamma"),
        "validation": {key: best[f"val/{key}"] for key in ACCURACIES} if best else None,
        "published": _best_published(progress.history),
        "bundle_sha256": bundle.sha256,
        "attributes": len(words),
        "device": str(choose_device(config.train.device)),
        "seconds": sum(entry["seconds"] for entry in history + progress.history),
    }

    def finish() -> None:
        if kept < epochs:
            checkpoint.load_weights(out / "final" / "kept.safetensors", model)
        checkpoint.write_json(out / "history.json", history + progress.history)
        checkpoint.save_model(out, model, config, info)
        _remove_leftovers(out)

    distributed.on_main(finish)
    return info


def _begin(config: Config, bundle: Bundle, words: NDArray[np.float32], out: Path) -> dict[str, Any] | None:
    """Write what is known before the first step; model.json's content where training is finished already."""
    out.mkdir(parents=True, exist_ok=True)
    check_resumable(config, bundle, words, out)
    checkpoint.write_text(out / "bundle.sha256", "\n".join(_digests(bundle, words)) + "\n")
    checkpoint.write_classes(out, bundle.classes)
    if (out / "model.json").exists():
        log.info("%s: training is already finished", out)
        _remove_leftovers(out)
        checkpoint.write_config(out, config)  # which says how it is evaluated
        return checkpoint.read_info(out)
    images = len(bundle.rows("train") if config.train.select else bundle.rows(*TRAINVAL))
    if config.optim.drop_last and images < config.optim.batch_size:
        raise ConfigError(
            f"optim.drop_last=true leaves nothing of {images} training images: expected optim.batch_size="
            f"{config.optim.batch_size} to be at most that many"
        )
    if config.optim.batch_size < distributed.world():
        raise ConfigError(
            f"optim.batch_size={config.optim.batch_size}: expected at least an image a step for each of "
            f"{distributed.world()} processes; start fewer"
        )
    checkpoint.write_config(out, config)
    return None


def run_phase(
    phase: Phase,
    config: Config,
    bundle: Bundle,
    words: NDArray[np.float32],
    out: Path,
    report: Log,
    saved: Callable[[], object] = lambda: None,
) -> tuple[SVIP, Progress]:
    """Train for the phase's epochs, from its last checkpoint if there is one."""
    folder = out / phase.name
    device = choose_device(config.train.device)
    torch.manual_seed(config.train.seed)
    model = SVIP(config.model, config.data.image_size, torch.from_numpy(words)).to(device)
    distributed.seed_dropout(config.train.seed)
    optimizer = build_optimizer(model, config.optim)
    dataset = ImageDataset(bundle, bundle.rows(*phase.roles), config.data, train=True, seed=config.train.seed)
    state = folder / "state.pt"

    def tell() -> None:
        entry = progress.history[-1]
        report({k: v for k, v in entry.items() if "/" in k}, entry["epoch"], phase.name, progress.ended)

    if distributed.on_main(state.exists):
        progress = Progress(**checkpoint.load_state(state, model, optimizer))
        log.info("%s: resumed after epoch %d, step %d", phase.name, progress.epoch, progress.batch)
        if progress.ended:
            tell()
    else:
        progress = Progress()
        if config.model.head_init == "probe":
            probe_heads(model, config, bundle, dataset.rows, bundle.classes_with(*phase.class_roles))

    def save(weights: Sequence[str] = ()) -> None:
        generators = distributed.all_gather(distributed.rng_state())

        def write() -> None:
            folder.mkdir(exist_ok=True)
            for name in weights:
                checkpoint.save_weights(folder / name, model)
            piles = piles_up(config, progress)
            checkpoint.save_state(state, model, optimizer, vars(progress), generators, piles)
            saved()

        distributed.on_main(write)

    while progress.epoch < phase.epochs:
        _train_epoch(phase, config, bundle, model, optimizer, dataset, progress, save)
        entry = _finish_epoch(phase, config, bundle, model, progress)
        best = phase.name == "select" and _best(progress.history) is entry
        kept = progress.epoch == phase.kept < phase.epochs
        save([*["best.safetensors"] * best, *["kept.safetensors"] * kept])
        tell()
    return model, progress


def _train_epoch(
    phase: Phase,
    config: Config,
    bundle: Bundle,
    model: SVIP,
    optimizer: torch.optim.AdamW,
    dataset: ImageDataset,
    progress: Progress,
    save: Callable[[], object],
) -> None:
    device = choose_device(config.train.device)
    classes = bundle.classes_with(*phase.class_roles)
    seen = torch.from_numpy(bundle.class_attributes[classes]).to(device)  # [S, A]
    groups = []
    if config.loss.group_weight:
        kinds = attribute_groups(config.data.dataset, bundle.attribute_names)
        groups = [torch.tensor(numbers, device=device) for numbers in kinds]
    position = torch.full((len(bundle.classes),), -1)
    position[torch.from_numpy(classes)] = torch.arange(len(classes))

    model.train()
    piles = piles_up(config, progress)
    model.backbone.set_trainable(progress.epoch >= config.optim.head_epochs or piles)
    if config.optim.renew_adam and progress.epoch >= config.optim.head_epochs and progress.batch == 0:
        optimizer.state.clear()
    order = EpochBatches(
        len(dataset),
        config.optim.batch_size,
        config.train.seed,
        progress.epoch,
        distributed.rank(),
        distributed.world(),
        start_batch=progress.batch,
        reshuffle=config.optim.reshuffle,
        drop_last=config.optim.drop_last,
    )
    steps_per_epoch = len(order) + progress.batch
    bar = tqdm(
        loader(dataset, order, config.train.workers),
        desc=f"{phase.name} epoch {progress.epoch + 1}/{phase.epochs}",
        initial=progress.batch,
        total=steps_per_epoch,
        disable=not distributed.is_main(),
    )
    forward = distributed.parallel(model)
    for images, labels, rows in bar:
        started = time.perf_counter()
        step = progress.epoch * steps_per_epoch + progress.batch
        set_rates(optimizer, rate_factor(config.optim, step, steps_per_epoch))
        own, whole = order.sizes(progress.batch)
        targets = position[labels].to(device)
        parts = train_step(
            model, optimizer, config, images.to(device), targets, seen, groups, piles, forward, own / whole
        )
        broken = next((name for name, value in parts.items() if not np.isfinite(value)), None)
        if broken:
            of_batch = [row for part in distributed.all_gather(rows.tolist()[:own]) for row in part]
            names = ", ".join(bundle.split["path"].iloc[of_batch])
            raise NonFiniteLoss(
                f"the {broken} is {parts[broken]} in phase {phase.name}, epoch {progress.epoch + 1}, step "
                f"{progress.batch + 1}; its images: {names}. Lower the learning rates, or set train.precision=fp32"
            )
        for name, value in parts.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value * whole
        progress.images += whole
        progress.batch += 1
        progress.seconds += time.perf_counter() - started
        bar.set_postfix(loss=f"{progress.sums['loss'] / progress.images:.3f}", refresh=False)
        if config.train.checkpoint_steps and progress.batch % config.train.checkpoint_steps == 0:
            save()
            forward = distributed.parallel(model)


def piles_up(config: Config, progress: Progress) -> bool:
    """Whether the backbone's gradients pile up at this time (``optim.head_stage``)."""
    return config.optim.head_stage == "piled" and progress.epoch < config.optim.head_epochs


def train_step(
    model: SVIP,
    optimizer: torch.optim.AdamW,
    config: Config,
    images: Tensor,
    targets: Tensor,
    seen: Tensor,
    groups: Sequence[Tensor] = (),
    piles: bool = False,
    forward: nn.Module | None = None,
    share: float = 1.0,
) -> dict[str, float]:
    """One step on uint8 images [B, 3, S, S] with targets [B] among the seen classes' attributes [S, A].

    ``groups``: attribute numbers of each group, for ``loss.group_weight``. ``piles``: the backbone's gradients are
    added to those that it has, and left there. Among several processes each has a ``share`` of the batch, and
    ``forward`` is ``distributed.parallel``'s: together they do what one does on the whole batch, since every loss is a
    mean over images.

    Returns the losses, unweighted but for their sum ``loss``. A non-finite loss changes nothing, nor does a non-finite
    gradient of a finite one: its norm is then returned too, as ``gradient``.
    """
    with autocast(config, images.device):
        passes = (forward or model)(images)
    source = model.class_scores(passes.source, seen)  # [B, S]
    parts = {"loss_cls": losses.classification(source, targets)}
    total = parts["loss_cls"]
    if passes.contextualized is not None:
        contextualized = model.class_scores(passes.contextualized, seen)
        parts["loss_cls"] = parts["loss_cls"] + losses.classification(contextualized, targets)
        heat = config.model.sigma * config.loss.temperature or 1.0
        divergence = losses.consistency(
            source / heat, contextualized / heat, config.loss.consistency, config.loss.consistency_mean
        )
        parts["loss_consistency"] = divergence * (config.loss.temperature**2 or 1.0)
        total = parts["loss_cls"] + config.loss.lambda1 * parts["loss_consistency"]
        if config.loss.group_weight:
            parts["loss_group"] = losses.group_decorrelation(passes.contextualized, groups)
            total = total + config.loss.group_weight * parts["loss_group"]
    if passes.patch_logits is not None and passes.patch_targets is not None:
        parts["loss_patch"] = losses.patch(passes.patch_logits, passes.patch_targets)
        total = total + config.loss.lambda2 * parts["loss_patch"]
    values = {"loss": total.item()} | {name: value.item() for name, value in parts.items()}
    values = distributed.mean(values, share)
    if np.isfinite(values["loss"]):
        aside = list(model.backbone.parameters()) if piles else []
        with _without_gradients(aside):
            optimizer.zero_grad(set_to_none=True)
        # of several processes' gradients the mean is taken
        (total if distributed.world() == 1 else distributed.world() * share * total).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf).item()
        if np.isfinite(norm):
            with _without_gradients(aside):
                optimizer.step()
        else:
            values["gradient"] = norm
    return values


@contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it these parameters have no gradients, so that nothing clears or applies them."""
    held = [(parameter, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, gradient in held:
        parameter.grad = gradient


def _finish_epoch(phase: Phase, config: Config, bundle: Bundle, model: SVIP, progress: Progress) -> dict[str, Any]:
    """Close the epoch's books: mean losses and, in the select phase, T1, U, S, H on the validation classes."""
    entry: dict[str, Any] = {"phase": phase.name, "epoch": progress.epoch + 1, "seconds": progress.seconds}
    entry |= {f"train/{name}": total / progress.images for name, total in progress.sums.items()}
    if phase.name == "select":
        entry |= {f"val/{name}": value for name, value in validate(model, config, bundle).items()}
        log.info(
            "select epoch %d: loss %.3f, validation T1 %.1f U %.1f S %.1f H %.1f",
            *(entry[k] for k in ("epoch", "train/loss", "val/T1", "val/U", "val/S", "val/H")),
        )
    if phase.name == "final" and config.train.published:
        entry |= {f"published/{name}": value for name, value in as_published(model, config, bundle).items()}
    entry = distributed.broadcast(entry)  # that all go by the same numbers, whatever machine they run on
    progress.history.append(entry)
    progress.ended = time.time_ns() // 1_000_000
    progress.epoch += 1
    progress.batch, progress.images, progress.sums, progress.seconds = 0, 0, {}, 0.0
    return entry


def validate(model: SVIP, config: Config, bundle: Bundle) -> dict[str, float]:
    """T1, U, S, H (percent) and their gamma, the best one, on held-out images of train and validation classes."""
    classes = bundle.classes_with("train", "val_unseen")
    predictions = predict(model, config, bundle, bundle.rows("val_seen", "val_unseen"), "validate")
    scores = predictions.scores(model, bundle.class_attributes[classes])
    labels = np.searchsorted(classes, predictions.labels)
    unseen = np.searchsorted(classes, bundle.classes_with("val_unseen"))
    gamma = SeenUnseenCurve.of(scores, labels, unseen).best_gamma()
    return zero_shot_metrics(scores, labels, unseen, gamma)


def as_published(model: SVIP, config: Config, bundle: Bundle) -> dict[str, float]:
    """What the published code looks at after each epoch: T1, U, S, H on the **test** images, tuned on them."""
    predictions = predict(model, config, bundle, bundle.rows("test_seen", "test_unseen"), "published protocol")
    scores = predictions.scores(model, bundle.class_attributes)
    return published_metrics(scores, predictions.labels, bundle.classes_with("test_unseen"))


def _run_cached(
    phase: Phase,
    config: Config,
    bundle: Bundle,
    words: NDArray[np.float32],
    out: Path,
    report: Log,
    saved: Callable[[], object],
) -> list[dict[str, Any]]:
    """The history of a phase whose model is not needed further; once finished it is never run again."""
    done = out / phase.name / "history.json"
    if not distributed.on_main(done.exists):
        _, progress = run_phase(phase, config, bundle, words, out, report, saved)
        distributed.on_main(lambda: checkpoint.write_json(done, progress.history))

    def tidied() -> list[dict[str, Any]]:
        (out / phase.name / "state.pt").unlink(missing_ok=True)
        return list(json.loads(done.read_text(encoding="utf-8")))

    return distributed.on_main(tidied)


def _best(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the best validation H (the first of them, where several are best)."""
    return max(history, key=lambda entry: entry["val/H"])


def _best_published(history: list[dict[str, Any]]) -> dict[str, float] | None:
    """The epoch of the best H on the test set, as the published code chooses it."""
    entries = [entry for entry in history if "published/H" in entry]
    if not entries:
        return None
    best = max(entries, key=lambda entry: entry["published/H"])
    return {"epoch": best["epoch"]} | {key: best[f"published/{key}"] for key in (*ACCURACIES, "gamma")}


def _remove_leftovers(out: Path) -> None:
    """What the final phase needed only until the model was saved."""
    for name in ("state.pt", "kept.safetensors"):
        (out / "final" / name).unlink(missing_ok=True)


def check_resumable(config: Config, bundle: Bundle, words: NDArray[np.float32], out: Path) -> bool:
    """Whether ``out`` was begun with this configuration, bundle and word vectors.

    CheckpointError where it was with others, and there is a checkpoint.
    """
    same = checkpoint.check_resumable(out, config)
    record = out / "bundle.sha256"
    before = record.read_text().split() if record.exists() else []
    # older folders hold the bundle's digest only
    for name, old, now in zip(("another bundle", "other word vectors"), before, _digests(bundle, words), strict=False):
        if old != now and checkpoint.can_go_on(out):
            raise checkpoint.CheckpointError(
                f"{out} was begun with {name} (sha256 {old[:12]}, now {now[:12]}); use the same to resume, "
                "or another --out"
            )
        same = same and old == now
    return same


def _digests(bundle: Bundle, words: NDArray[np.float32]) -> tuple[str, str]:
    return bundle.sha256, vectors_sha256(words)
