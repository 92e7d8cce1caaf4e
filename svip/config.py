"""The configuration tree: one dataclass a subject, presets in ``svip/presets`` and dotted overrides on top.

``load_config("paper/cub", ["optim.lr=1e-5"])`` is the only way in; what it returns is what runs and what is saved.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from svip.nearest import did_you_mean


class ConfigError(ValueError):
    """A configuration that can't run; the message names the field, what was expected and what to do."""


@dataclass
class DataConfig:
    dataset: str = "synthetic"
    """Which data set: synthetic, cub, awa2, sun, apy, or custom for one of your own."""
    root: str | None = None
    """Folder that holds the original archives' content and xlsa17; not used by synthetic. custom: the folder that the
    paths of the images count from, if it is not the one of their table."""
    mirror: str | None = None
    """Where prepare_data fetches what is missing below ``root``: ``web`` (the owners), or a mirror's address."""
    images: str | None = None
    """custom: table of the images, CSV or Parquet with the columns path, class and, optionally, role."""
    attributes: str | None = None
    """custom: table of the classes, CSV or Parquet with the columns class, optionally split, and one an attribute."""
    unseen_fraction: float = 0.2
    """custom without a split in its tables: share of the classes that are unseen, of the seen ones that are validation
    classes, and of a seen class's images that are for testing."""
    like: str = "none"
    """synthetic: as large as this real data set (cub, awa2, sun), for load tests. none: the toy birds."""
    split: str = "standard"
    """standard: the Proposed Split. development: a whole zero-shot problem inside the trainval classes (train classes
    of the fold are seen, its validation classes play the unseen ones), so that the real test photos stay untouched."""
    fold: int = 1
    """Class fold of xlsa17 that parts the trainval classes into train and validation classes: 1, 2 or 3."""
    val_seen_fraction: float = 0.15
    """Share of each train class's images held out as val_seen (and, in the development split, as test_seen)."""
    store_size: int = 256
    """Shorter side of the stored images, in pixels; 0 keeps the original size."""
    image_size: int = 224
    """Side of the square view that the model sees, in pixels."""
    train_view: str = "center"
    """center: centre crop of the stored image. squash: resize to the square. random_crop: random resized crop."""
    flip: bool = True
    """Mirror training images at random."""
    test_view: str = "center"
    """center or squash."""
    allow_missing: bool = False
    """Go on with the photos that are there when listed ones are missing (they are counted in bundle.json)."""
    seed: int = 0
    """Seed of the held-out images, and of all pixels of the synthetic data set."""


@dataclass
class SemanticsConfig:
    vectors: str | None = None
    """Word vectors: a file (text of GloVe or word2vec, word2vec's binary form, gensim's KeyedVectors; also in .gz or
    .zip), its http(s) or s3 address, or a name of gensim-data. Empty: the bundle's own (synthetic has some)."""
    phrases: str | None = None
    """YAML file with the rules by which attribute names become words; empty: those shipped for the data set, if any."""
    pooling: str = "mean"
    """How the words of one attribute become one vector: mean or sum."""
    allow_missing: bool = False
    """Go on when an attribute has no known word at all (its vector is then zero, and listed in the report)."""


@dataclass
class ModelConfig:
    backbone: str = "deit_base_patch16_224.fb_in1k"
    """Name of a timm vision transformer."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model, such as depth."""
    weights: str = "timm"
    """timm: the pretrained weights of that name. none: random. Else the path of a safetensors file with timm's keys."""
    frozen_blocks: int = 0
    """Blocks from the input on (with the embeddings below them) that are never trained."""
    selected_groups: int = 40
    """M of Eq. 8: merged groups that count as semantic-related."""
    score: str = "eq4"
    """How the attention of all layers becomes one score a token. eq4: Eq. 4 as printed. rollout: the published code's
    attention rollout, (mean over heads + identity) / 2 multiplied over the layers."""
    grouping: str = "block"
    """Which token scores a merged group takes the mean of. block: those of its own 2x2 block. raster: those of four
    consecutive tokens, as in the published code (so they are not its own)."""
    targets: str = "minmax"
    """What the patch classifier learns (Eq. 6). minmax: the scores scaled to [0, 1] in each image, high = related.
    unrelated: the published code's hard labels, 1 for the groups outside the top M; its classifier finds those."""
    patch_gradient: bool = False
    """Let the patch loss train the patch embedding too, as in the published code; otherwise the patch classifier
    alone, so that the loss does not bend the features."""
    training_mask: str = "classifier"
    """What selects the groups in training. classifier: as at test time (Eqs. 8-9). pseudo_labels: the top M of the
    attention scores (Algorithm 1 and the published code)."""
    hidden: int = 512
    """Width of the patch classifier's hidden layer (Eq. 5)."""
    contextualize: str = "unselected"
    """Where e is added in pass 2 (Eq. 9): unselected; all (Table 2's w/o SSPS); drop: no e, the unselected tokens are
    removed (w/o PSC); none: there is no second pass."""
    context: str = "w2p"
    """w2p: e is projected from the attributes' word vectors (Eq. 7). random: a free parameter (Table 2's w/o W2P)."""
    context_init: str = "default"
    """default: W2P starts as linear layers do, with e about as large as a patch embedding. zero: e starts at zero, so
    that pass 2 starts equal to pass 1; kinder to short trainings of a pretrained backbone."""
    layout: str = "subtoken"
    """How W2P's [D, 4] becomes the group embedding e. subtoken: one column a token. interleaved: flattened without a
    transpose, which mixes channels and tokens (published code)."""
    readout: str = "p2a"
    """p2a: attributes are read off the selected patches (Eq. 10). cls: off the class token (w/o P2A). both: their
    sum, a departure from the paper for backbones whose class token is much stronger than their patch tokens."""
    pooling: str = "max"
    """How P2A pools over groups: max (Eq. 10), or mean as in the published code."""
    pooled_contextualized: str = "selected"
    """Which groups pass 2 pools over in training. selected: S_M. central: the M groups with the largest dot product
    with the mean group (published code)."""
    pooled_test: str = "selected"
    """Which groups are pooled over at test time: selected (S_M), or all as in the published code."""
    logits: str = "cosine"
    """cosine: Eq. 11. dot: the attribute prediction is not normalised, only the class attributes are (published)."""
    sigma: float = 5.0
    """Temperature that scales the cosine similarities or dot products (Eq. 11)."""
    head_init: str = "random"
    """random; or probe: start the attribute read-out from a closed-form ridge probe on the frozen features."""


@dataclass
class LossConfig:
    consistency: str = "jeffreys"
    """jeffreys: Eq. 13 as printed. jsd: the Jensen-Shannon divergence that its name says. kl: one-sided, of pass 2 from
    pass 1 (published code)."""
    consistency_mean: str = "images"
    """images: the divergence is averaged over the batch. elements: over batch and classes (published code)."""
    temperature: float = 0.0
    """T > 0 compares the passes as in distillation: logits without sigma, divided by T, the loss times T^2 (published
    code: 20). 0: the class probabilities themselves (Eq. 13)."""
    lambda1: float = 1.0
    """Weight of the consistency loss (Eq. 14)."""
    lambda2: float = 3.0
    """Weight of the patch loss (Eq. 14)."""
    group_weight: float = 0.0
    """Weight of the group decorrelation, which the published code has and the paper has not: the norm of pass 2's
    prediction within each attribute group."""


@dataclass
class OptimConfig:
    epochs: int = 30
    """Passes over the training images, the head-only ones included."""
    head_epochs: int = 4
    """First epochs in which the backbone is frozen."""
    head_stage: str = "frozen"
    """What becomes of the backbone's gradients in those epochs. frozen: there are none. piled: it does not move either,
    but they are computed, never cleared, and felt in the norm that is clipped (published code)."""
    batch_size: int = 64
    """Images a step, over all processes."""
    lr: float = 3.0e-5
    """Learning rate of the backbone."""
    head_lr: float = 5.0e-5
    """Learning rate of everything else."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) of matrices."""
    beta1: float = 0.9
    """Adam's first decay rate."""
    beta2: float = 0.999
    """Adam's second decay rate."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    schedule: str = "step"
    """step: times 0.8 every 5 epochs. cosine: to zero over the run. constant."""
    warmup: float = 0.0
    """Share of all steps over which both rates rise linearly from zero."""
    reshuffle: bool = True
    """Draw a new order of the training images in each epoch. Otherwise that of the first is kept: the published code
    never shuffles, but the split file that it follows lists the images in a mixed order."""
    drop_last: bool = False
    """Leave out the last, smaller batch of each epoch (published code)."""
    renew_adam: bool = False
    """Forget Adam's moments at the start of every epoch after the head-only ones (published code)."""


@dataclass
class TrainConfig:
    seed: int = 0
    """Seed of initialisation, order and augmentation."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:N."""
    precision: str = "fp32"
    """fp32; or bf16: autocast of the forward pass, parameters stay in fp32."""
    workers: int = 0
    """Loader processes (per process of training)."""
    checkpoint_steps: int = 0
    """Also save a checkpoint every so many steps; 0: only at the end of each epoch."""
    select: bool = True
    """Choose epoch and gamma on the validation classes first, then retrain on trainval. Without it there is one run on
    trainval for all epochs, and no gamma but 0 is honest."""
    published: bool = False
    """Also follow the published protocol: train on trainval for all epochs, test after each, and note the best. Chosen
    on the test set, so no result; the model that is kept has nothing of it."""


@dataclass
class EvaluationConfig:
    protocols: list[str] = field(default_factory=lambda: ["validation", "none", "oracle"])
    """validation: gamma from the validation classes. none: gamma 0. oracle: gamma from the test set (labelled so).
    published: epoch and offset from the test set, accuracy by sample: how the paper's table was made."""
    batch_size: int = 64
    """Images a step of inference."""
    eszsl: bool = True
    """Also evaluate the comparator: closed-form ESZSL on frozen features of the same backbone."""


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    semantics: SemanticsConfig = field(default_factory=SemanticsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


CHOICES: dict[str, tuple[Any, ...]] = {
    "data.dataset": ("synthetic", "cub", "awa2", "sun", "apy", "custom"),
    "data.like": ("none", "cub", "awa2", "sun"),
    "data.split": ("standard", "development"),
    "data.fold": (1, 2, 3),
    "data.train_view": ("center", "squash", "random_crop"),
    "data.test_view": ("center", "squash"),
    "semantics.pooling": ("mean", "sum"),
    "model.contextualize": ("unselected", "all", "drop", "none"),
    "model.context": ("w2p", "random"),
    "model.context_init": ("default", "zero"),
    "model.score": ("eq4", "rollout"),
    "model.grouping": ("block", "raster"),
    "model.targets": ("minmax", "unrelated"),
    "model.training_mask": ("classifier", "pseudo_labels"),
    "model.layout": ("subtoken", "interleaved"),
    "model.readout": ("p2a", "cls", "both"),
    "model.pooling": ("max", "mean"),
    "model.pooled_contextualized": ("selected", "central"),
    "model.pooled_test": ("selected", "all"),
    "model.logits": ("cosine", "dot"),
    "model.head_init": ("random", "probe"),
    "loss.consistency": ("jeffreys", "jsd", "kl"),
    "loss.consistency_mean": ("images", "elements"),
    "optim.head_stage": ("frozen", "piled"),
    "optim.schedule": ("step", "cosine", "constant"),
    "train.precision": ("fp32", "bf16"),
}
AT_LEAST: dict[str, float] = {
    "data.seed": 0,
    "data.store_size": 0,
    "data.image_size": 1,
    "model.frozen_blocks": 0,
    "model.selected_groups": 1,
    "model.hidden": 1,
    "loss.lambda1": 0,
    "loss.lambda2": 0,
    "loss.temperature": 0,
    "loss.group_weight": 0,
    "optim.epochs": 1,
    "optim.head_epochs": 0,
    "optim.batch_size": 1,
    "optim.lr": 0,
    "optim.head_lr": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "train.seed": 0,
    "train.workers": 0,
    "train.checkpoint_steps": 0,
    "evaluation.batch_size": 1,
}
PROTOCOLS = ("validation", "none", "oracle", "published")
EXPECTED: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}
EXPECTED |= {list: "a list, such as [none,oracle]", dict: "a mapping, such as {depth: 2}"}


def presets() -> list[str]:
    """Names of the presets that ship with the package, such as ``paper/cub``."""
    root = Path(str(resources.files("svip") / "presets"))
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def load_config(preset: str = "smoke", overrides: Sequence[str] = (), check: bool = True) -> Config:
    """The configuration of a preset (a shipped name, or the path of a YAML file) with ``key=value`` overrides.

    Raises ConfigError with the nearest valid name for an unknown key or preset; with ``check`` also for values out of
    range.
    """
    source = _preset_path(preset)
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(source))
    except Exception as error:  # YAML errors have no common base in OmegaConf
        raise ConfigError(f"{source} is not a readable YAML file: {error}") from error
    _refuse_unknown_keys(loaded, str(source))
    assert isinstance(loaded, dict)
    # a section may be empty: all of its lines commented out
    layers = [OmegaConf.create({name: section for name, section in loaded.items() if section is not None})]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, e.g. optim.lr=1e-5")
        _refuse_unknown_key(key, "override")
        try:
            layers.append(OmegaConf.from_dotlist([override]))
        except Exception as error:  # YAML's errors again
            raise ConfigError(f"{key}: can't read {value!r} as YAML; quote it, or close its brackets") from error
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *layers))
    except ValidationError as error:
        expected = EXPECTED.get(type(get_value(Config(), str(error.full_key))), "text")
        raise ConfigError(f"{error.full_key}={error.value!r}: expected {expected}") from error
    except OmegaConfBaseException as error:  # an interpolation
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0].rstrip('.')}") from error
    assert isinstance(config, Config)
    if check:
        validate(config)
    return config


def validate(config: Config) -> None:
    """Raise ConfigError for the first value that is out of range."""
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value!r}: expected a finite number")
    for key in ("data.mirror", "semantics.vectors"):
        if re.match(r"https?://([^/]*@|.*\?)", get_value(config, key) or ""):  # it is saved and tracked with every run
            raise ConfigError(f"{key}: an address with a password or query; use ~/.netrc, or fetch it beforehand")
    for key, allowed in CHOICES.items():
        if get_value(config, key) not in allowed:
            raise ConfigError(f"{key}={get_value(config, key)!r}: expected one of {', '.join(map(str, allowed))}")
    for key, least in AT_LEAST.items():
        if get_value(config, key) < least:
            raise ConfigError(f"{key}={get_value(config, key)!r}: expected at least {least}")
    if config.model.sigma <= 0:
        raise ConfigError(f"model.sigma={config.model.sigma!r}: expected more than 0")
    for key in ("optim.beta1", "optim.beta2", "optim.warmup", "data.val_seen_fraction", "data.unseen_fraction"):
        if not 0 <= get_value(config, key) < 1:
            raise ConfigError(f"{key}={get_value(config, key)!r}: expected 0 <= value < 1")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.train.device):
        raise ConfigError(f"train.device={config.train.device!r}: expected one of auto, cpu, cuda, cuda:N")
    head, epochs = config.optim.head_epochs, config.optim.epochs
    if head > epochs:
        raise ConfigError(f"optim.head_epochs={head} is more than optim.epochs={epochs}")
    if config.data.dataset != "synthetic" and 0 < config.data.store_size < config.data.image_size:
        raise ConfigError(f"data.store_size={config.data.store_size} is below data.image_size={config.data.image_size}")
    for protocol in config.evaluation.protocols:
        if protocol not in PROTOCOLS:
            raise ConfigError(f"evaluation.protocols: {protocol!r} is not one of {', '.join(PROTOCOLS)}")


def get_value(config: Config, key: str) -> Any:
    """The value behind a dotted key."""
    return operator.attrgetter(key)(config)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for all leaves, in order."""
    return {key: get_value(config, key) for key in _keys(Config)}


def variant(config: Config) -> str:
    """A short name of what is trained: svip, baseline, or the switches that make it another one."""
    model = config.model
    if model.contextualize == "none" and model.readout == "cls":
        return "baseline"
    changed = [
        f"{name}={value}"
        for name, value, usual in (
            ("contextualize", model.contextualize, "unselected"),
            ("context", model.context, "w2p"),
            ("readout", model.readout, "p2a"),
        )
        if value != usual
    ]
    return "-".join(["svip", *changed])


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a saved configuration (unknown keys are refused, as in a preset)."""
    return load_config(str(path), overrides)


def _preset_path(preset: str) -> Path:
    if preset.endswith((".yaml", ".yml")):
        if not Path(preset).is_file():
            raise ConfigError(f"preset file {preset} does not exist")
        return Path(preset)
    if preset not in presets():
        hint = did_you_mean(preset, presets(), cutoff=0.5)
        raise ConfigError(f"unknown preset {preset!r}; {hint}there are: {', '.join(presets())}, or a path to a .yaml")
    return Path(str(resources.files("svip") / "presets" / f"{preset}.yaml"))


def _keys(node: type, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(node):
        default = item.default_factory() if callable(item.default_factory) else item.default
        name = f"{prefix}{item.name}"
        keys += _keys(type(default), f"{name}.") if is_dataclass(default) else [name]
    return keys


def _refuse_unknown_keys(tree: Any, source: str, prefix: str = "") -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, found {type(tree).__name__}")
    sections = {key.split(".")[0] for key in _keys(Config)}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in sections:
            _refuse_unknown_keys({} if value is None else value, source, f"{key}.")
        else:
            _refuse_unknown_key(key, source)


def _refuse_unknown_key(key: str, source: str) -> None:
    known = _keys(Config)
    if key in known or key.startswith("model.backbone_args."):
        return
    close = _closest(key, known)
    hint = f"did you mean {close[0]!r}?" if close else "`svip config` lists all keys"
    raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def _closest(key: str, known: Sequence[str]) -> list[str]:
    """The field that was meant, if any is close: the right name in a wrong section before a similar name."""
    leaves = {name: name.rsplit(".", 1)[-1] for name in known}
    leaf = key.rsplit(".", 1)[-1]
    same = [name for name in known if leaves[name] == leaf]
    if same:
        return difflib.get_close_matches(key, same, n=1, cutoff=0)
    similar = difflib.get_close_matches(leaf, leaves.values(), n=1)
    return difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [name for name in known if leaves[name] in similar]
