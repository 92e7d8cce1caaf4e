"""What a run's name and its tag ``changes`` say."""

from __future__ import annotations

import pytest

from svip.changes import LONGEST_NAME, changes, changes_text, run_name, short_key, with_changes
from svip.config import load_config


def named(*overrides: str, preset: str = "smoke", run: str = "") -> tuple[str, str]:
    """Name of the training and tag of a preset with overrides."""
    config = load_config(preset, overrides)
    changed = changes(config, load_config(preset))
    return run_name("train", config, changed, run), changes_text(changed)


@pytest.mark.parametrize("preset", ["smoke", "paper/cub", "published/sun"])
def test_a_preset_as_it_is_has_no_changes(preset: str) -> None:
    assert named(preset=preset) == ("train-svip", "")
    assert named("data.root=elsewhere", "train.workers=3", "train.device=cpu", preset=preset) == ("train-svip", "")


def test_a_name_has_the_changes_alone_and_short() -> None:
    assert named("optim.lr=1e-5", "model.selected_groups=4") == (
        "train-svip M=4 lr=1e-5",
        "model.selected_groups=4, optim.lr=1e-05",
    )
    assert named("optim.lr=1.0e-3", "train.seed=0") == ("train-svip", ""), "the preset's own values, said again"
    assert named("train.seed=2", run="no_psc:2") == ("train-no_psc:2 seed=2", "train.seed=2")


def test_what_the_variant_says_is_not_said_again() -> None:
    name, tag = named("model.readout=cls", "model.contextualize=none", "loss.lambda1=0")
    assert name == "train-baseline lambda1=0"
    assert tag == "model.contextualize=none, model.readout=cls, loss.lambda1=0"


def test_values_are_written_as_overrides_are() -> None:
    assert named("optim.reshuffle=false", "evaluation.protocols=[none,oracle]", "semantics.vectors=/big/glove.txt") == (
        "train-svip vectors=glove.txt reshuffle=false protocols=[none,oracle]",
        "semantics.vectors=/big/glove.txt, optim.reshuffle=false, evaluation.protocols=[none,oracle]",
    )


def test_of_a_mapping_only_the_entries_that_differ_count() -> None:
    assert named("model.backbone_args.depth=3", "model.backbone_args.qkv_bias=false") == (
        "train-svip depth=3 qkv_bias=false",
        "model.backbone_args.depth=3, model.backbone_args.qkv_bias=false",
    )


def test_a_key_whose_last_part_is_not_its_own_stays_whole() -> None:
    assert short_key("optim.batch_size") == "optim.batch_size", "evaluation has one too"
    assert short_key("train.seed") == "seed", "and not data.seed"
    assert short_key("data.seed") == "data.seed"
    assert short_key("loss.lambda2") == "lambda2"


def test_a_long_name_ends_with_the_number_of_changes_that_it_leaves_out() -> None:
    many = {f"model.backbone_args.option{number}": "0123456789" for number in range(10)}
    name = with_changes("train-svip", many)
    assert name == "train-svip " + " ".join(f"option{n}=0123456789" for n in range(4)) + " +6"
    assert len(name) <= LONGEST_NAME < len(name) + len(" option4=0123456789")
