from __future__ import annotations

import ast
from pathlib import Path

import pytest

import svip.config
from svip.config import (
    AT_LEAST,
    CHOICES,
    Config,
    ConfigError,
    flatten,
    from_yaml,
    get_value,
    load_config,
    presets,
    to_yaml,
)

PRESETS = {"smoke", "paper/cub", "paper/awa2", "paper/sun", "development/cub"}


def fields_by_class() -> dict[str, list[tuple[str, bool]]]:
    """Class -> (field, does a string stand below it), as the source says."""
    tree = ast.parse(Path(svip.config.__file__).read_text(encoding="utf-8"))
    return {
        node.name: [
            (
                ast.unparse(line.target),
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str),
            )
            for line, below in zip(node.body, [*node.body[1:], None], strict=True)
            if isinstance(line, ast.AnnAssign)
        ]
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }


def test_every_field_has_a_docstring() -> None:
    classes = fields_by_class()
    assert len(classes.pop("Config")) == len(classes), "one section a class"
    undocumented = [f"{name}.{key}" for name, keys in classes.items() for key, documented in keys if not documented]
    assert undocumented == []


def test_flatten_lists_every_field_once_and_in_order() -> None:
    classes = fields_by_class()
    sections = [key for key, _ in classes.pop("Config")]
    expected = [f"{s}.{key}" for s, keys in zip(sections, classes.values(), strict=True) for key, _ in keys]
    config = load_config("smoke", ["optim.lr=0.5", "model.backbone_args.depth=2"])
    flat = flatten(config)
    assert list(flat) == expected
    assert flat["optim.lr"] == 0.5
    assert flat["model.backbone_args"] == {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 4}
    assert all(get_value(config, key) == value for key, value in flat.items())


def test_every_rule_is_about_a_field_and_every_default_obeys_it() -> None:
    defaults = flatten(Config())
    assert {*CHOICES, *AT_LEAST} <= set(defaults)
    svip.config.validate(Config())


@pytest.mark.parametrize("preset", presets())
def test_a_preset_loads_and_saves(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "saved.yaml") == config


def test_the_presets_are_found() -> None:
    assert set(presets()) >= PRESETS
    assert presets() == sorted(presets())


@pytest.mark.parametrize(
    ("preset", "epochs", "head_epochs", "head_lr", "lr", "groups", "lambda2", "beta1"),
    [
        ("paper/cub", 30, 4, 5e-5, 3e-5, 40, 3, 0.5),
        ("paper/awa2", 30, 6, 1e-6, 3e-6, 45, 4, 0.8),
        ("paper/sun", 50, 4, 1e-4, 1e-5, 45, 3, 0.5),
    ],
)
def test_the_paper_s_presets_hold_the_published_scripts_settings(
    preset: str, epochs: int, head_epochs: int, head_lr: float, lr: float, groups: int, lambda2: float, beta1: float
) -> None:
    config = load_config(preset)
    optim = config.optim
    assert (optim.epochs, optim.head_epochs, optim.head_lr, optim.lr) == (epochs, head_epochs, head_lr, lr)
    assert (optim.batch_size, optim.weight_decay, optim.beta1, optim.beta2) == (64, 0, beta1, 0.999)
    assert (optim.clip_norm, optim.schedule) == (1, "step")
    assert (config.model.selected_groups, config.model.sigma, config.loss.lambda1) == (groups, 5, 1)
    assert config.loss.lambda2 == lambda2
    assert config.data.dataset == preset.removeprefix("paper/")


def test_overrides_win_over_the_preset_and_the_preset_over_the_default() -> None:
    defaults, preset = flatten(Config()), flatten(load_config("paper/awa2"))
    changed = flatten(load_config("paper/awa2", ["optim.lr=0.1", "loss.lambda1=7"]))
    assert (defaults["optim.lr"], preset["optim.lr"], changed["optim.lr"]) == (3e-5, 3e-6, 0.1)
    assert (defaults["loss.lambda2"], preset["loss.lambda2"], changed["loss.lambda2"]) == (3, 4, 4)
    assert (defaults["loss.lambda1"], preset["loss.lambda1"], changed["loss.lambda1"]) == (1, 1, 7)
    assert (defaults["train.seed"], preset["train.seed"], changed["train.seed"]) == (0, 0, 0)
    assert {key for key in changed if changed[key] != preset[key]} == {"optim.lr", "loss.lambda1"}


def test_the_last_of_several_overrides_counts() -> None:
    assert load_config("smoke", ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-5", 1e-5),
        ("optim.lr=1.0e-05", 1e-5),
        ("optim.lr=1", 1.0),
        ("optim.epochs=12", 12),
        ("data.flip=false", False),
        ("data.flip=True", True),
        ("evaluation.protocols=[none,oracle]", ["none", "oracle"]),
        ("evaluation.protocols=[]", []),
        ("data.root=/data/with space=and equals", "/data/with space=and equals"),
        ("data.root=2024", "2024"),
        ("data.root=null", None),
        ("train.device=cuda:1", "cuda:1"),
    ],
)
def test_a_value_takes_the_type_of_its_field(override: str, expected: object) -> None:
    key = override.split("=")[0]
    got = get_value(load_config("smoke", [override]), key)
    assert got == expected
    assert type(got) is type(expected)


def test_arguments_of_the_backbone_are_free_and_added_to_the_preset_s() -> None:
    changes = ["model.backbone_args.depth=3", "model.backbone_args.qkv_bias=false", "model.backbone_args.scale=1e-3"]
    assert load_config("smoke", changes).model.backbone_args == {
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 3,
        "num_heads": 4,
        "qkv_bias": False,
        "scale": 1e-3,
    }
    assert load_config("paper/cub", ["model.backbone_args={depth: 3}"]).model.backbone_args == {"depth": 3}


def test_two_configurations_share_nothing() -> None:
    first, second = load_config("smoke"), load_config("smoke")
    first.evaluation.protocols.append("published")
    first.model.backbone_args["depth"] = 99
    assert second == load_config("smoke")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("optim.betta1", "optim.beta1"),
        ("optim.weight_decy", "optim.weight_decay"),
        ("optm.lr", "optim.lr"),
        ("optimizer.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("lrr", "optim.lr"),
        ("sigma", "model.sigma"),
        ("train.lr", "optim.lr"),
        ("optim.sigma", "model.sigma"),
        ("train.batch_size", "optim.batch_size"),
        ("training.seed", "train.seed"),
        ("epoch", "optim.epochs"),
        ("loss.lamda2", "loss.lambda2"),
        ("model.backbone_arg.depth", "model.backbone_args"),
        ("evaluation.protocol", "evaluation.protocols"),
        ("optim.lr.x", "optim.lr"),
        ("optim", "optim.lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("smoke", [f"{typo}=1"])
    assert str(refused.value) == f"override: unknown key {typo!r}; did you mean {meant!r}?"


def test_a_key_that_resembles_none_is_refused_with_where_to_look() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'xyzzy'; `svip config` lists all keys"):
        load_config("smoke", ["xyzzy=1"])


@pytest.mark.parametrize(
    ("typo", "hint"),
    [
        ("smoek", "did you mean 'smoke'?"),
        ("paper/cubb", "did you mean 'paper/cub'?"),
        ("paper/AwA2", "did you mean 'paper/awa2'?"),
        ("cub", "did you mean 'paper/cub'?"),
        ("xyzzy", "there are: "),
    ],
)
def test_an_unknown_preset_is_refused_with_the_nearest_one_and_a_list(typo: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(typo)
    assert f"unknown preset {typo!r}; {hint}" in str(refused.value)
    assert all(name in str(refused.value) for name in presets())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.fold=4", "one of 1, 2, 3"),
        ("data.dataset=CUB", "one of synthetic, cub, awa2, sun, apy, custom"),
        ("loss.consistency=js", "one of jeffreys, jsd, kl"),
        ("train.precision=fp16", "one of fp32, bf16"),
        ("train.device=gpu", "one of auto, cpu, cuda, cuda:N"),
        ("optim.epochs=0", "at least 1"),
        ("optim.lr=-1e-5", "at least 0"),
        ("train.seed=-1", "at least 0"),
        ("optim.beta1=1", "0 <= value < 1"),
        ("data.val_seen_fraction=-0.1", "0 <= value < 1"),
        ("model.sigma=0", "more than 0"),
        ("optim.lr=nan", "a finite number"),
        ("model.sigma=inf", "a finite number"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_field_and_what_was_expected(override: str, expected: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(ConfigError) as refused:
        load_config("smoke", [override])
    assert str(refused.value).startswith(f"{key}=")
    assert str(refused.value).endswith(f": expected {expected}")


@pytest.mark.parametrize("key", AT_LEAST)
def test_the_least_value_is_allowed_and_a_lower_one_is_not(key: str) -> None:
    # head_epochs may not be more than epochs, and stays at 0 in this preset
    assert get_value(load_config("smoke", [f"{key}={AT_LEAST[key]}"]), key) == AT_LEAST[key]
    with pytest.raises(ConfigError, match=f"{key}=.*expected at least {AT_LEAST[key]}"):
        load_config("smoke", [f"{key}={AT_LEAST[key] - 1}"])


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CHOICES.items() for value in values])
def test_every_choice_can_be_made(key: str, value: object) -> None:
    assert get_value(load_config("smoke", [f"{key}={value}"]), key) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.epochs=3", "optim.head_epochs=4"], "optim.head_epochs=4 is more than optim.epochs=3"),
        (["data.dataset=cub", "data.store_size=32"], "data.store_size=32 is below data.image_size=64"),
        (["evaluation.protocols=[none,orakel]"], "'orakel' is not one of validation, none, oracle"),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("smoke", overrides)


def test_values_that_just_go_together_are_taken() -> None:
    assert load_config("smoke", ["data.dataset=cub", "data.store_size=0"]).data.store_size == 0  # the original size
    assert load_config("smoke", ["data.dataset=cub", "data.store_size=64"]).data.store_size == 64
    assert load_config("smoke", ["optim.epochs=3", "optim.head_epochs=3"]).optim.head_epochs == 3  # all head-only


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=fast", "optim.lr='fast': expected a number"),
        ("optim.lr=", "optim.lr=None: expected a number"),
        ("optim.epochs=1.5", "optim.epochs=1.5: expected a whole number"),
        ("data.flip=maybe", "data.flip='maybe': expected true or false"),
        ("data.root=[a]", "data.root=['a']: expected text"),
        ("model.backbone=[a]", "model.backbone=['a']: expected text"),
        ("model.backbone_args=3", "model.backbone_args=3: expected a mapping, such as {depth: 2}"),
        ("evaluation.protocols=none", "evaluation.protocols='none': expected a list, such as [none,oracle]"),
        ("evaluation.protocols=[none", "evaluation.protocols: can't read '[none' as YAML"),
        ("data.root=${nowhere}", "data.root: Interpolation key 'nowhere' not found"),
        ("data.root=${open", "data.root: can't read"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_with_the_field_and_what_was_expected(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("smoke", [override])
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("override", ["optim.lr", "optim.lr 3", "--resume", "=3"])
def test_an_override_without_key_or_value_is_refused_with_an_example(override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override!r} is not of the form key=value, e.g. optim.lr=1e-5"):
        load_config("smoke", [override])


@pytest.mark.parametrize("root", ["/a b", "null", "true", "1e-5", "a: b", "[x]", "#5", "ünïcode", "", "'quoted'"])
def test_what_is_saved_loads_back_equal(root: str, tmp_path: Path) -> None:
    config = load_config("paper/sun", ["optim.lr=1e-5", "evaluation.protocols=[none]", "model.backbone_args.depth=3"])
    config.data.root = root
    config.model.backbone_args |= {"list": [1, 2], "nested": {"deep": 1e-7}, "nothing": None}
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = from_yaml(tmp_path / "config.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_a_file_of_one_s_own_is_a_preset(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("optim:\n  lr: 1e-4  # without a dot, YAML 1.1 reads a string\ndata: {fold: 2}\n")
    config = load_config(str(own), ["data.fold=3"])
    assert {key: value for key, value in flatten(config).items() if value != flatten(Config())[key]} == {
        "optim.lr": 1e-4,
        "data.fold": 3,
    }


@pytest.mark.parametrize("text", ["", "optim:\n  # lr: 1\ndata:\n  fold: 1\n", "# nothing but a comment\n"])
def test_an_empty_file_or_section_leaves_the_defaults(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert load_config(str(tmp_path / "own.yaml")) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- optim\n- data\n", "own.yaml: expected a mapping of sections, found list"),
        ("optim: 3\n", "own.yaml: expected a mapping of sections, found int"),
        ("optim: []\n", "own.yaml: expected a mapping of sections, found list"),
        ("optim:\n  lrr: 3\n", "own.yaml: unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("optm:\n  lr: 3\n", "own.yaml: unknown key 'optm'; did you mean 'optim.lr'"),
        ("optim:\n  lr: fast\n", "^optim.lr='fast': expected a number"),
        ("optim:\n  epochs: 0\n", "^optim.epochs=0: expected at least 1"),
        ("optim: [\n", "own.yaml is not a readable YAML file"),
        ("optim: {lr: 1}\noptim: {lr: 2}\n", "own.yaml is not a readable YAML file: .*\n.*\n?.*duplicate key optim"),
        ("42\n", "own.yaml is not a readable YAML file"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "own.yaml"))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset file .*missing.yml does not exist"):
        load_config(str(tmp_path / "missing.yml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary.yaml is not a readable YAML file"):
        load_config(str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize("address", ["https://bob:secret@host/glove.txt", "http://host/glove.txt?sig=secret"])
def test_addresses_with_a_secret_stay_out_of_what_is_saved(address: str) -> None:
    for key in ("data.mirror", "semantics.vectors"):
        with pytest.raises(ConfigError, match=f"^{key}: an address with a password or query") as refused:
            load_config("smoke", [f"{key}={address}"])
        assert "secret" not in str(refused.value)
    load_config("smoke", ["data.mirror=https://host/zsl", "semantics.vectors=s3://team/who?.txt"])
