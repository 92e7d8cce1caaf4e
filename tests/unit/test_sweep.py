"""Sweeps: which runs they have, and the tables and panels made of their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from svip import steps, sweep
from svip.config import flatten, load_config, variant
from svip.evaluation import comparison
from svip.evaluation.comparison import Row

NAMES = ["baseline", "no_ssps", "no_psc", "no_jsd", "no_w2p", "no_p2a", "full"]


def numbers(h: float, protocol: str = "validation") -> dict[str, Any]:
    return {protocol: {"T1": h + 10, "U": h - 1, "S": h + 1, "H": h, "gamma": 0.5}}


@pytest.mark.parametrize(
    ("name", "expected", "changed"),
    [
        ("baseline", "baseline", {"model.contextualize": "none", "model.readout": "cls"}),
        ("no_ssps", "svip-contextualize=all", {"model.contextualize": "all"}),
        ("no_psc", "svip-contextualize=drop", {"model.contextualize": "drop"}),
        ("no_jsd", "svip", {"loss.lambda1": 0.0}),
        ("no_w2p", "svip-context=random", {"model.context": "random"}),
        ("no_p2a", "svip-readout=cls", {"model.readout": "cls"}),
        ("full", "svip", {}),
    ],
)
def test_a_variant_turns_its_own_switches_and_nothing_else(name: str, expected: str, changed: dict[str, Any]) -> None:
    run = sweep.ablation_run(f"{name}:2")
    before, config = load_config("paper/cub"), load_config("paper/cub", run.overrides)
    assert variant(config) == expected
    differing = {key: value for key, value in flatten(config).items() if value != flatten(before)[key]}
    assert differing == {**changed, "train.seed": 2}


def test_the_papers_numbers_agree_with_their_own_harmonic_means() -> None:
    variants = sweep.ablation()
    assert [row.name for row in variants] == NAMES
    for row in variants:
        assert list(row.paper) == ["cub", "awa2", "sun"]
        for _, u, s, h in row.paper.values():
            assert h == pytest.approx(2 * u * s / (u + s), abs=0.1), row.name


@pytest.mark.parametrize("names", [["no_psk"], ["full", "no_psk"], ["all", "no_psk"]])
def test_an_unknown_variant_is_refused_with_the_nearest_name(names: list[str]) -> None:
    with pytest.raises(sweep.SweepError, match="unknown variant 'no_psk'; did you mean 'no_psc'"):
        sweep.ablation(names)


@pytest.mark.parametrize("name", ["full", "full:", "full:x", ":1"])
def test_a_run_is_a_variant_and_a_seed(name: str) -> None:
    with pytest.raises(sweep.SweepError):
        sweep.ablation_run(name)


def test_runs_go_seed_by_seed_with_the_unchanged_configuration_first() -> None:
    assert steps.plan_ablation(["no_psc", "full"], 2) == ["full:0", "no_psc:0", "full:1", "no_psc:1"]
    assert len(steps.plan_ablation(["all"], 3)) == 21
    assert sweep.ablation_run("no_psc:1").folder(Path("out")) == Path("out/no_psc/seed-1")
    with pytest.raises(sweep.SweepError, match="seeds=0: expected at least 1"):
        steps.plan_ablation(["all"], 0)


def test_what_has_the_same_configuration_has_one_home() -> None:
    runs = sweep.runs_of(sweep.ablation(["no_p2a", "no_psc", "full"]), 2)
    homes = sweep.homes_of(runs, "smoke", ["model.readout=cls"])  # so that full lacks P2A as well
    assert {run.name: home.name for run, (home, _) in homes.items()} == {
        **{"full:0": "full:0", "no_p2a:0": "full:0", "no_psc:0": "no_psc:0"},
        **{"full:1": "full:1", "no_p2a:1": "full:1", "no_psc:1": "no_psc:1"},
    }


def test_figure_4_varies_each_parameter_and_shares_the_unchanged_run() -> None:
    config = load_config("paper/cub", ["model.backbone=deit_tiny_patch16_224.fb_in1k"])
    panels = {panel.parameter: panel for panel in sweep.sensitivity(config)}
    assert {name: list(panel.points) for name, panel in panels.items()} == {
        "M": [35, 38, 40, 42, 45, 49],
        "lambda1": [0.1, 0.3, 1, 3, 5],
        "lambda2": [1, 2, 3, 4, 5],
        "sigma": [1, 3, 5, 7, 10],
    }
    assert {name: panel.default for name, panel in panels.items()} == {"M": 40, "lambda1": 1, "lambda2": 3, "sigma": 5}
    shared = {panel.points[panel.default] for panel in panels.values()}
    assert [(row.name, row.overrides) for row in shared] == [("default", ())]
    assert panels["lambda1"].points[0.1].overrides == ("loss.lambda1=0.1",)
    every = {row for panel in panels.values() for row in panel.points.values()}
    assert len(every) == 6 + 5 + 5 + 5 - 3


def test_m_keeps_its_share_of_the_groups_and_a_default_between_the_values_joins_in() -> None:
    (panel,) = sweep.sensitivity(load_config("smoke"), ["M"])  # 64 px in patches of 8: 8x8 tokens, 16 groups
    assert list(panel.points) == [8, 11, 12, 13, 14, 15, 16]
    assert panel.points[8].name == "default"
    with pytest.raises(sweep.SweepError, match="unknown parameter 'gamma'; did you mean 'sigma'"):
        sweep.sensitivity(load_config("smoke"), ["gamma"])


def test_the_table_has_means_deviations_and_differences_paired_by_seed() -> None:
    results = {
        "full": {0: numbers(70), 1: numbers(72), 2: numbers(74)},
        "other": {0: numbers(71), 1: numbers(74), 2: numbers(77)},
        "one": {1: numbers(71)},
    }
    rows = [Row("other", "Other"), Row("one", "One"), Row("none", "None"), Row("full", "Full")]
    table = comparison.summarize(rows, results, "validation", "full").set_index("variant")
    assert table.loc["other", ["seeds", "H", "H_sd", "T1", "U", "S"]].tolist() == [3, 74, 3, 84, 73, 75]
    # differences 1, 2, 3: mean 2, deviation 1; Student's t of 95 % with two degrees of freedom is 4.3027
    assert table.loc["other", "difference"] == 2
    assert table.loc["other", "interval"] == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert table.loc["one", ["seeds", "H", "difference"]].tolist() == [1, 71, -1]
    assert table.loc["one", ["H_sd", "interval"]].isna().all()
    assert table.loc["none", "seeds"] == 0 and pd.isna(table.loc["none", "H"])
    assert pd.isna(table.loc["full", "difference"])


def test_the_files_say_how_many_seeds_a_row_lacks(tmp_path: Path) -> None:
    results = {"full": {0: numbers(70), 1: numbers(72)}, "other": {0: numbers(71)}}
    rows = [Row("other", "Other <b>", (1.0, 2.0, 3.0, 4.0)), Row("full", "Full")]
    made_with = "Preset smoke; 2 seeds."
    page = comparison.write_comparison(tmp_path, "ablation", "Title", rows, results, "full", 2, made_with)
    assert f"<p>{made_with}</p>" in page.read_text()
    assert (tmp_path / "ablation.md").read_text().endswith(f"\n\n{made_with}\n")
    header, _, other, full = (tmp_path / "ablation.md").read_text().splitlines()[:4]
    assert header == "| Variant | seeds | T1 | U | S | H | H - full | paper T1 | paper U | paper S | paper H |"
    assert other == "| Other <b> | 1 of 2 | 81.0 | 70.0 | 72.0 | 71.0 | +1.0 | 1.0 | 2.0 | 3.0 | 4.0 |"
    assert full == ("| Full | 2 of 2 | 81.0 ± 1.4 | 70.0 ± 1.4 | 72.0 ± 1.4 | 71.0 ± 1.4 | - | - | - | - | - |")
    assert "Other &lt;b&gt;" in page.read_text()
    assert pd.read_csv(tmp_path / "ablation.csv")["seeds"].tolist() == [1, 2]
    comparison.write_comparison(tmp_path, "ablation", "Title", rows[1:], results, "full", 2, "")
    assert "| Variant | T1 |" in (tmp_path / "ablation.md").read_text(), "nothing is missing there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ablation.csv", "ablation.html", "ablation.md"]


def test_the_protocol_is_the_honest_one_that_all_runs_have() -> None:
    both, none = {**numbers(70, "oracle"), **numbers(60)}, {**numbers(70, "none"), **numbers(80, "oracle")}
    assert comparison.common_protocol({"a": {0: both}}) == "validation"
    assert comparison.common_protocol({"a": {0: none}}) == "none"
    assert comparison.common_protocol({"a": {0: none}, "b": {0: both}}) == "oracle"
    with pytest.raises(ValueError, match="no protocol in common"):
        comparison.common_protocol({"a": {0: numbers(1)}, "b": {0: numbers(1, "none")}})


def test_a_panel_draws_means_bars_and_the_default() -> None:
    results = {"default": {0: numbers(70), 1: numbers(74)}, "M-3": {0: numbers(60)}}
    panels = [("M", 2.0, {1.0: "M-1", 2.0: "default", 3.0: "M-3"}), ("sigma", 5.0, {5.0: "default"})]
    figure = comparison.sensitivity_figure(panels, results, "validation")
    first, second = figure.axes
    lines = [container.lines for container in first.containers if isinstance(container, ErrorbarContainer)]
    assert [np.asarray(line.get_ydata()).tolist() for line, _, _ in lines if line is not None] == [
        [82, 70],
        [71, 59],
        [73, 61],
        [72, 60],
    ]
    bars = [[path.T[1].tolist() for path in bar.get_segments() if path.size] for _, _, (bar,) in lines]
    # of 70 and 74: the square root of 8; a single seed has no bar
    assert bars[3] == [pytest.approx([72 - 8**0.5, 72 + 8**0.5])]
    assert [label.get_text() for label in first.get_xticklabels()] == ["1", "2", "3"]
    assert np.asarray(first.lines[0].get_xdata())[0] == 1, "the second of the three values"
    assert (first.get_xlabel(), second.get_xlabel()) == ("(a) M", "(b) sigma")


@pytest.fixture
def evaluations(tmp_path: Path) -> list[str]:
    """Evaluations of three runs on CUB, the last run's first."""
    folders = []
    for h, name in enumerate(["full:1", "baseline:0", "full:0"], start=60):
        config = load_config("paper/cub", sweep.ablation_run(name).overrides)
        folder = tmp_path / f"evaluation {h}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"settings": flatten(config), "protocols": numbers(h)}))
        folders.append(str(folder))
    return folders


def test_evaluations_find_their_rows_by_configuration_and_the_papers_numbers_stand_beside(
    evaluations: list[str], tmp_path: Path
) -> None:
    page = steps.ablate_table(evaluations, str(tmp_path), ["full:0", "baseline:0", "full:1"], "paper/cub")
    table = pd.read_csv(Path(page).with_suffix(".csv")).set_index("variant")
    assert table.index.tolist() == ["baseline", "full"]
    assert table["H"].to_dict() == {"baseline": 61, "full": 61}
    assert table["seeds"].to_dict() == {"baseline": 1, "full": 2}
    assert table.loc["baseline", "difference"] == 61 - 62
    assert table.loc["full", ["paper_T1", "paper_U", "paper_S", "paper_H"]].tolist() == [80.4, 72.8, 79.7, 76.1]


def test_a_run_without_an_evaluation_is_named(evaluations: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the 3 evaluations has the configuration of run no_psc:0"):
        steps.ablate_table(evaluations, str(tmp_path), ["full:0", "no_psc:0"], "paper/cub")
    with pytest.raises(ValueError, match="of run full:0"):
        steps.ablate_table(evaluations, str(tmp_path), ["full:0"], "paper/cub", ["data.split=development"])
