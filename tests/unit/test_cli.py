"""The command line as its user sees it: help, output, and errors of one line."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from pipelines.cli import app as pipeline
from svip import cli
from svip.cli import shared
from svip.config import Config, from_yaml, load_config, presets
from svip.data.bundle import Bundle, BundleWriter
from svip.data.prepare import Plan
from svip.semantics.vectors import read_embedding

STEPS = ("prepare-data", "embed-attributes", "train", "evaluate", "report")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def svip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run svip's own main(), which CliRunner would leave out: exit code, stdout and stderr."""
    level = logging.getLogger().level
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["svip", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    yield run
    logging.getLogger().setLevel(level)


def write_bundle(path: Path, word_vectors: bool = True) -> Bundle:
    """One black image a class, two attributes and a vector for each of their words."""
    classes = pd.DataFrame(
        {
            "name": ["wren", "crow", "gull"],
            "role": ["train", "val_unseen", "test_unseen"],
            "wing_color::red": [0.0, 1, 0],
            "size::big": [1.0, 0, 0.5],
        }
    )
    words = "".join(f"{word} {n} 1\n" for n, word in enumerate(("wing", "color", "red", "size", "big")))
    with BundleWriter(path) as writer:
        for label, role in enumerate(classes["role"]):
            writer.add(f"{label}.jpg", label, role, np.zeros((32, 32, 3), np.uint8))
        info = {"dataset": "synthetic", "split": "standard", "fold": 1, "settings": {"seed": 0}}
        return writer.finish(classes, info, {"word_vectors.txt": words} if word_vectors else None)


def test_help_lists_the_steps_in_order_with_an_example() -> None:
    result = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    listed = result.output.split("Commands")[1]
    places = [listed.index(f" {step} ") for step in STEPS]
    assert places == sorted(places)
    assert "svip pipeline run experiment --preset smoke" in result.output.split("Example:")[1]


def test_pipelines_join_in_as_an_extension(svip: Run) -> None:
    assert [extension.name for extension in entry_points(group="svip.commands")] == ["pipeline"]
    code, out, _ = svip("pipeline", "--help")
    assert code == 0
    assert "run" in out and "compile" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_fits_a_terminal_and_ends_with_an_example_that_parses(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    example = result.output.split("Example:")[1].strip()
    assert "\n" not in example, "one line, to be copied"
    assert f"{example} ".startswith(f"svip {name} ")
    COMMANDS[name].make_context(name, shlex.split(example)[2:])  # exits for an option that it doesn't have
    for option in COMMANDS[name].params:
        assert getattr(option, "help", None) or option.hidden or option.name == "help", f"{option.name} has no help"


def test_every_command_of_the_readme_and_the_docs_parses() -> None:
    root = Path(__file__).parents[2]
    commands = {"pipeline": typer.main.get_command(pipeline), **COMMANDS}
    found = 0
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in re.findall(r"^svip (.*)", block.replace("\\\n", " "), re.M):
                name, *arguments = shlex.split(line, comments=True)
                command = commands[name]
                while isinstance(command, TyperGroup):
                    name, command = arguments[0], command.commands[arguments.pop(0)]
                try:
                    command.make_context(name, arguments)
                except typer.TyperException as error:
                    pytest.fail(f"{page.name}: svip {line}: {error.format_message()}")
                found += 1
    assert found > 50


@pytest.mark.parametrize("name", ["prepare-data", "embed-attributes", "train", "config", "benchmark"])
def test_overrides_are_announced_as_key_value(name: str) -> None:
    usage = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80"}).output.strip().splitlines()[0]
    assert usage.strip().endswith(f" {name} [OPTIONS] [KEY=VALUE]...")


def test_config_lists_the_presets_one_a_line(svip: Run) -> None:
    assert svip("config", "--list") == (0, "\n".join(presets()) + "\n", "")


def test_config_prints_what_would_run_and_it_is_a_preset_itself(svip: Run, tmp_path: Path) -> None:
    code, out, err = svip("config", "-p", "paper/awa2", "optim.lr=1e-5", "data.flip=false")
    assert (code, err) == (0, "")
    (tmp_path / "own.yaml").write_text(out)
    assert from_yaml(tmp_path / "own.yaml") == load_config("paper/awa2", ["optim.lr=1e-5", "data.flip=false"])
    assert svip("config", "-p", tmp_path / "own.yaml") == (0, out, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "optim.lrr=1"], "override: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["config", "optim.lr"], "override 'optim.lr' is not of the form key=value, e.g. optim.lr=1e-5"),
        (["config", "evaluation.protocols=[none"], "can't read '[none' as YAML"),
        (["config", "-p", "[bold]smoke"], "unknown preset '[bold]smoke'; did you mean 'smoke'?"),
        (["config", "data.fold=[/x]"], "data.fold=['/x']: expected a whole number"),
        (
            ["train", "--bundle", ".", "--vectors", ".", "-o", "x", "optim.epochs=0"],
            "optim.epochs=0: expected at",
        ),
        (["train", "--bundle", ".", "--vectors", ".", "-o", "x"], ". is not a split bundle (no bundle.json); make one"),
        (
            ["evaluate", "--checkpoint", "gone", "--bundle", ".", "-o", "x"],
            "gone holds no finished training (there is no",
        ),
        (["predict", "a.jpg", "b.jpg", "--checkpoint", "."], "there is no file a.jpg, b.jpg"),
        (["fetch", "cubb", "--root", "x"], "nothing to fetch is called 'cubb'; did you mean 'cub'?"),
        (["prepare-data", "-o", "x", "--dataset", "sun"], "give the folder that holds the archives of sun (--root)"),
    ],
)
def test_an_expected_error_is_one_line_and_exit_code_1(
    svip: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = svip(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing has begun"


def test_the_process_itself_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "svip.cli", "config", "optim.lrr=1"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "40"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: override: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"


def test_a_mistyped_name_is_told_before_what_takes_seconds_to_load(tmp_path: Path) -> None:
    commands = [
        "train --bundle gone --vectors gone -o x",
        "evaluate --checkpoint gone --bundle gone -o x",
        "predict gone.jpg --checkpoint gone",
        "tune --bundle gone --vectors gone -o x",
        "compare --experiment gone",
        "rerun gone",
        "register gone",
    ]
    code = (
        "import sys\nfrom svip.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    sys.argv = ['svip', *command.split()]\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n"
        "        print(ended.code, sorted({'torch', 'mlflow', 'optuna'} & set(sys.modules)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-c", code, *commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["1 []"] * len(commands)
    assert list(tmp_path.iterdir()) == [], "nor is mlflow.db made by looking into it"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, svip: Run) -> None:
    monkeypatch.setattr(sys, "argv", ["svip", "--debug", "config", "optim.lrr=1"])
    with pytest.raises(ValueError, match="unknown key"):
        cli.main()


@pytest.mark.parametrize("arguments", [["evaluate", "--bundle", "b"], ["prepare-data", "-o", "x", "--dataset", "cubb"]])
def test_a_wrong_usage_is_exit_code_2_and_says_what_was_expected(svip: Run, arguments: list[str]) -> None:
    code, _, err = svip(*arguments)
    assert code == 2
    assert err.startswith("error: ") and err.endswith(f" (svip {arguments[0]} --help)\n") and err.count("\n") == 1
    assert "--checkpoint" in err or "'synthetic', 'cub', 'awa2', 'sun', 'apy', 'custom'" in err


def test_a_folder_without_a_model_or_an_evaluation_says_how_to_make_one(svip: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle").path
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = svip("evaluate", "--checkpoint", empty, "--bundle", bundle, "--out", tmp_path / "out")
    assert code == 1
    assert "empty holds no finished training (no model.json); run `svip train" in err
    code, _, err = svip(
        *("report", "--evaluation", empty, "--checkpoint", empty, "--bundle", bundle, "--out", tmp_path / "out")
    )
    assert code == 1
    assert "empty holds no evaluation (no metrics.json); make one with `svip evaluate`" in err
    code, _, err = svip("train", "--vectors", empty, "--bundle", bundle, "--out", tmp_path / "out")
    assert code == 1
    assert "make them with `svip embed-attributes`" in err
    assert not (tmp_path / "out").exists()


def test_embed_attributes_writes_the_vectors_and_counts_them(svip: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle").path
    code, out, _ = svip("embed-attributes", "--bundle", bundle, "--out", tmp_path / "words")
    assert (code, out) == (0, f"2 attribute vectors in {tmp_path}/words; 0 words out of vocabulary\n")
    # the mean of wing, color and red, which are numbered 0, 1, 2, and of size and big
    assert read_embedding(tmp_path / "words").vectors.tolist() == [[1, 1], [3.5, 1]]


def test_embed_attributes_takes_a_file_whatever_its_name_and_lists_unknown_words(svip: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", word_vectors=False).path
    code, _, err = svip("embed-attributes", "--bundle", bundle, "--out", tmp_path / "words")
    assert code == 1
    assert "(--vectors glove.6B.300d.txt)" in err
    odd = tmp_path / "glove #1: [300d].txt"  # YAML and terminal markup would read it otherwise
    odd.write_text("color 1 0\nred 0 1\nsize 0 1\nbig 1 1\nwings 1 1\n")
    code, out, _ = svip("embed-attributes", "--bundle", bundle, "--out", tmp_path / "words", "--vectors", odd)
    assert code == 0
    assert out.splitlines()[0].endswith("1 words out of vocabulary")
    row = next(line for line in out.splitlines() if "wing (wings)" in line)
    assert "wing_color::red" in row
    assert "color red" in row
    assert read_embedding(tmp_path / "words").vectors.tolist() == [[0.5, 0.5], [0.5, 1]]


def test_embed_attributes_refuses_the_preset_of_another_data_set(svip: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle").path
    arguments = ["embed-attributes", "--bundle", bundle, "--out", tmp_path / "words", "-p", "paper/cub"]
    code, _, err = svip(*arguments)
    assert code == 1
    assert f"data.dataset=cub (preset paper/cub), but the bundle {bundle} has synthetic" in " ".join(err.split())
    assert not (tmp_path / "words").exists()


def test_train_refuses_a_bundle_that_the_preset_did_not_make(svip: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle").path
    svip("embed-attributes", "--bundle", bundle, "--out", tmp_path / "words")
    arguments = ["train", "--bundle", bundle, "--vectors", tmp_path / "words", "--out", tmp_path / "run"]
    for change, message in {
        ("-p", "paper/cub"): "data.dataset=cub (preset paper/cub), but the bundle",
        ("data.fold=2",): "override data.fold=1",
        ("data.split=development",): "override data.split=standard",
        ("data.seed=3",): "override data.seed=0",
    }.items():
        code, _, err = svip(*arguments, *change)
        assert code == 1
        assert message in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that reach the making of bundles, which rendering or decoding would make slow."""
    configurations: list[Config] = []

    def plan(config: Config) -> Plan:
        configurations.append(config)
        return Plan({"settings": {}, "source": {}}, write_bundle)

    monkeypatch.setattr("svip.steps.data.plan_bundle", plan)
    return configurations


def test_prepare_data_prints_the_images_by_role(svip: Run, prepared: list[Config], tmp_path: Path) -> None:
    code, out, _ = svip("prepare-data", "--out", tmp_path / "bundle")
    assert code == 0
    assert out.startswith(f"synthetic, standard split, fold 1: {tmp_path}/bundle\n")
    cells = [line.replace("│", " ").split() for line in out.splitlines()]
    assert [row for row in cells if len(row) == 2 and row[1].isdigit()] == [
        ["train", "1"],
        ["val_seen", "0"],
        ["val_unseen", "1"],
        ["test_seen", "0"],
        ["test_unseen", "1"],
    ]
    assert prepared == [load_config("smoke")]


@pytest.mark.parametrize("root", ["1.10", "null", "a: b", "my data"])
def test_prepare_data_s_options_are_overrides_of_the_paper_s_preset(
    svip: Run, prepared: list[Config], tmp_path: Path, root: str
) -> None:
    options = ["--dataset", "awa2", "--root", root, "--allow-missing", "data.fold=2"]
    assert svip("prepare-data", "--out", tmp_path / "bundle", *options)[0] == 0
    config = load_config("paper/awa2", ["data.fold=2", "data.allow_missing=true"])
    config.data.root = root
    assert prepared == [config]


@pytest.mark.parametrize(
    ("options", "preset", "overrides"),
    [
        (["--dataset", "synthetic", "--like", "sun"], "paper/sun", ["data.dataset=synthetic", "data.like=sun"]),
        (
            ["--dataset", "custom", "--images", "i.csv", "--attributes", "c.csv"],
            "paper/cub",
            ["data.dataset=custom", "data.images=i.csv", "data.attributes=c.csv"],
        ),
        (["--dataset", "apy", "--root", "data"], "paper/cub", ["data.dataset=apy", "data.root=data"]),
    ],
)
def test_data_without_a_preset_of_its_own_takes_one_of_the_paper(
    svip: Run, prepared: list[Config], tmp_path: Path, options: list[str], preset: str, overrides: list[str]
) -> None:
    assert svip("prepare-data", "--out", tmp_path / "bundle", *options)[0] == 0
    assert prepared == [load_config(preset, overrides)]


def test_datasets_lists_what_there_is_and_what_is_here(svip: Run, tmp_path: Path) -> None:
    photo = tmp_path / "awa2" / "Animals_with_Attributes2" / "JPEGImages" / "ox" / "1.jpg"
    photo.parent.mkdir(parents=True)
    photo.touch()
    code, out, _ = svip("datasets", "--root", tmp_path)
    assert code == 0
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["cub", "11,788", "150", "+", "50", "312", "0", "photos,", "no", "splits"] in rows
    assert ["awa2", "37,322", "40", "+", "10", "85", "1", "photos,", "no", "splits"] in rows
    assert ["cub", "CUB_200_2011.tgz", "1.15", "GB", "missing"] in rows
    assert ["sun", "SUNAttributeDB_Images.tar.gz", "missing"] in rows, "the longest name, whole in 80 columns"
    assert f"svip fetch NAME --root {tmp_path}" in out
    entries = json.loads(svip("datasets", "--root", tmp_path, "--json")[1])
    assert [entry["name"] for entry in entries] == ["cub", "awa2", "sun", "apy", "xlsa17", "glove.6B", "glove.840B"]
    assert entries[0]["archives"][0]["size"] == 1_150_585_339


def metrics() -> dict[str, Any]:
    values = {"T1": 45.12, "U": 40.0, "S": 30.0, "H": 34.3, "gamma": 0.125}
    names = ("validation", "none", "oracle")
    return {
        "protocols": dict.fromkeys(names, values),
        "comparators": {"eszsl": {"protocols": {name: values | {"H": 7.0, "gamma": -0.5} for name in names}}},
        "chance": {"T1": 10.0, "U": 1.0, "S": 1.0, "H": 1.0},
    }


def test_the_results_table_fits_a_terminal_and_labels_the_oracle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shared.print_metrics(metrics())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "mean of per-class top-1" in lines[0]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    svip_oracle = next(row for row in rows if row[0] == "SVIP" and row[1].startswith("oracle"))
    assert svip_oracle[2:] == ["45.1", "40.0", "30.0", "34.3", "0.125"]
    assert rows[rows.index(svip_oracle) + 1][1].endswith("not a result")
    assert [row[5] for row in rows if row[0] == "ESZSL"] == ["7.0"] * 3
    assert rows[-1][0] == "Chance"


def test_training_prints_what_the_validation_classes_said(
    svip: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle, words = write_bundle(tmp_path / "bundle").path, tmp_path / "words"
    svip("embed-attributes", "--bundle", bundle, "--out", words)
    reached = {"run_id": "abc", "val/T1": 50.04, "val/U": 1, "val/S": 2.0, "val/H": 3.0}
    monkeypatch.setattr("svip.steps.train", lambda *arguments: dict(reached))
    _, out, _ = svip("train", "--bundle", bundle, "--vectors", words, "--out", "runs/[x]")
    assert out == "trained: runs/[x] (MLflow run abc)\non the validation classes: T1 50.0, U 1.0, S 2.0, H 3.0\n"
    reached = {"run_id": "abc"}
    _, out, _ = svip("train", "--bundle", bundle, "--vectors", words, "--out", "run", "train.select=false")
    assert out == "trained: run (MLflow run abc)\n"


def test_an_override_s_text_is_taken_as_it_is() -> None:
    for text in ("a", "1.10", 'say "hi"', "back\\slash", "ünïcode", "🐦", "#x"):
        assert load_config("smoke", [f"data.root={shared.quoted(text)}"]).data.root == text
