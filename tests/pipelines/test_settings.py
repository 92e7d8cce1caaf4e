"""What a cluster file may say, and what becomes of it in a compiled pipeline."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from strict_ir import Tree, dangling, executors_of, read_strictly
from typer.testing import CliRunner

from components import IMAGE
from pipelines.catalog import PIPELINES, PipelineError
from pipelines.cluster_cli import app
from pipelines.compiling import compile_pipeline
from pipelines.settings import SettingsError, load_cluster, step_names
from svip import trainjob
from svip.config import ConfigError, load_config

SHIPPED = Path(__file__).parents[2] / "infra" / "cluster.yaml"
Compiled = Callable[..., tuple[Tree, Tree]]


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    """Compile a pipeline for the text of a cluster file (the shipped one, where None) and read it strictly."""

    def compile_for(text: str | None = None, name: str = "experiment") -> tuple[Tree, Tree]:
        out = tmp_path / f"{name}.yaml"
        compile_pipeline(name, out, load_cluster(SHIPPED if text is None else written(tmp_path, text)))
        return read_strictly(out)

    return compile_for


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def container(spec: Tree, step: str) -> Any:
    return spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]


def retries(spec: Tree, step: str) -> Any:
    dags = [spec["root"], *spec["components"].values()]
    (task,) = (owner["dag"]["tasks"][step] for owner in dags if step in owner.get("dag", {}).get("tasks", {}))
    return task.get("retryPolicy")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("cluster", [None, SHIPPED], ids=["plain", "cluster"])
def test_a_compiled_pipeline_is_read_strictly_and_all_its_references_resolve(
    name: str, cluster: Path | None, tmp_path: Path
) -> None:
    compile_pipeline(name, tmp_path / "out.yaml", load_cluster(cluster) if cluster else None)
    spec, platform = read_strictly(tmp_path / "out.yaml")
    assert dangling(spec, platform) == []
    executors = spec["deploymentSpec"]["executors"]
    assert set(executors_of(platform)) == (set(executors) if cluster else set())
    assert {executor["container"]["image"] for executor in executors.values()} == {IMAGE}


def test_a_reference_that_leads_nowhere_is_found(compiled: Compiled) -> None:
    spec, platform = compiled(name="ablation")
    steps = "comp-exit-handler-1"

    def broken(change: Callable[[Tree], None]) -> list[str]:
        other = copy.deepcopy(spec)
        change(other)
        return dangling(other, platform)

    def tasks(other: Tree) -> Any:
        return other["components"][steps]["dag"]["tasks"]

    assert broken(lambda other: tasks(other).pop("data-settings"))
    assert broken(lambda other: tasks(other)["prepare-data"]["inputs"]["parameters"].pop("preset")) == [
        f"{steps}/prepare-data: is not given preset"
    ]
    assert broken(lambda other: other["deploymentSpec"]["executors"].pop("exec-train")) == [
        "comp-train: no executor exec-train",
        "platform: no executor exec-train",
    ]
    assert broken(lambda other: other["components"]["comp-embed-attributes"]["outputDefinitions"].clear())
    assert broken(lambda other: tasks(other)["for-loop-2"]["dependentTasks"].remove("prepare-data")) == [
        f"{steps}/for-loop-2: does not wait for prepare-data, whose bundle it takes"
    ]


def test_the_shipped_file_is_what_the_manifests_have(compiled: Compiled) -> None:
    spec, platform = compiled()
    train = container(spec, "train")
    assert {key: value for key, value in train["resources"].items() if key.startswith("resource")} == {
        "resourceCpuRequest": "4",
        "resourceMemoryRequest": "24Gi",
        "resourceMemoryLimit": "24Gi",
    }
    assert train["resources"]["accelerator"] == {
        "count": "1",
        "type": "nvidia.com/gpu",
        "resourceCount": "1",
        "resourceType": "nvidia.com/gpu",
    }
    assert {entry["name"]: entry["value"] for entry in train["env"]} == {
        "AWS_ENDPOINT_URL": "http://svip-s3:8333",
        "SVIP_GPU_TYPE": "nvidia.com/gpu",
        "SVIP_IMAGE": IMAGE,
        "SVIP_NAMESPACE": "svip",
        "SVIP_NODES": "1",
        "SVIP_OUTBOX": "/work/outbox",
        "SVIP_PROCESSES": "1",
        "SVIP_TRAINING_RUNTIME": "svip",
        "SVIP_WORK": "/work/training",
    }
    pod = executors_of(platform)["exec-train"]
    assert pod["emptyDirMounts"] == [
        {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "8Gi", "volumeName": "shm"}
    ]
    assert [(mount["constant"], mount["mountPath"]) for mount in pod["pvcMount"]] == [("svip-work", "/work")]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "accelerator" not in container(spec, "prepare-data")["resources"]
    assert "emptyDirMounts" not in executors_of(platform)["exec-prepare-data"]


def test_the_steps_of_tuning_share_the_study_and_its_folder_and_train_as_training_does(compiled: Compiled) -> None:
    spec, platform = compiled(name="tuning")
    pods = executors_of(platform)
    for step in ("plan-tuning", "tune", "tuning-report"):
        assert pods[f"exec-{step}"]["secretAsEnv"][-1]["secretName"] == "svip-tuning"
        assert {"name": "SVIP_WORK", "value": "/work/training"} in container(spec, step)["env"]
    assert container(spec, "tune")["resources"] == container(spec, "train")["resources"]
    assert "SVIP_NODES" not in {entry["name"] for entry in container(spec, "plan-tuning")["env"]}


def test_secrets_appear_by_name_only(compiled: Compiled) -> None:
    spec, platform = compiled()
    assert "AWS_SECRET" not in json.dumps(spec)
    for pod in executors_of(platform).values():
        asked = {secret["secretName"]: secret["keyToEnv"] for secret in pod["secretAsEnv"]}
        assert {name: [key["secretKey"] for key in keys] for name, keys in asked.items()} == {
            "svip-mlflow": ["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"],
            "svip-s3": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
        }
        assert all(key["secretKey"] == key["envVar"] for keys in asked.values() for key in keys)


def test_a_lost_step_is_tried_again_for_days_not_for_kfps_hour(compiled: Compiled) -> None:
    spec, _ = compiled()
    assert retries(spec, "train") == {
        "backoffDuration": "30s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": f"{30 * 24 * 3600}s",
        "maxRetryCount": 5,
    }
    assert retries(spec, "prepare-data")["maxRetryCount"] == 2
    assert retries(compiled("steps: {train: {retries: 1}}")[0], "prepare-data") is None


def test_a_step_has_the_default_and_what_its_own_entry_changes(compiled: Compiled) -> None:
    spec, platform = compiled(
        """
        image: registry.example/svip:1.2
        image_pull_secrets: [registry]
        steps:
          default: {memory: 2Gi, env: {A: "1", B: "2"}, node_selector: {pool: cpu}, cache: false}
          train:
            env: {B: "3", A: null}
            gpus: 2
            gpu_type: amd.com/gpu
            node_selector: {pool: null, accelerator: mi300}
            tolerations: [{key: spot, value: "yes", effect: NoExecute, seconds: 60}]
        """
    )
    variables = {entry["name"]: entry["value"] for entry in container(spec, "train")["env"]}
    assert {key: variables.get(key) for key in ("A", "B", "SVIP_PROCESSES")} == {
        "A": None,
        "B": "3",
        "SVIP_PROCESSES": "2",
    }
    assert container(spec, "train")["image"] == "registry.example/svip:1.2"
    assert container(spec, "train")["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    assert container(spec, "train")["resources"]["resourceMemoryLimit"] == "2Gi"
    pod = executors_of(platform)["exec-train"]
    assert pod["nodeSelector"]["labels"] == {"accelerator": "mi300"}
    assert pod["tolerations"] == [
        {
            "key": "spot",
            "operator": "Equal",
            "value": "yes",
            "effect": "NoExecute",
            "tolerationSeconds": "60",
        }
    ]
    assert pod["imagePullSecret"][0]["secretName"] == "registry"
    assert executors_of(platform)["exec-report"]["nodeSelector"]["labels"] == {"pool": "cpu"}
    assert not spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]["train"]["cachingOptions"]


def test_training_on_several_nodes_leaves_what_training_takes_to_them(compiled: Compiled) -> None:
    spec, platform = compiled(
        """
        training: {nodes: 2}
        steps:
          default: {cpu: 250m, memory: 3Gi, volumes: {work: /work}}
          train:
            gpus: 4
            cpu: "8"
            memory: 64Gi
            shm: 8Gi
            node_selector: {gpu: a100}
            tolerations: [{key: gpu, operator: Exists}]
            env: {A: "1"}
            retries: 5
        """
    )
    resources = container(spec, "train")["resources"]
    assert {key: value for key, value in resources.items() if key.startswith("resource")} == {
        "resourceCpuRequest": "250m",
        "resourceMemoryRequest": "3Gi",
        "resourceMemoryLimit": "3Gi",
    }
    assert "accelerator" not in resources
    pod = executors_of(platform)["exec-train"]
    assert not {"nodeSelector", "tolerations", "emptyDirMounts"} & set(pod)
    assert [mount["constant"] for mount in pod["pvcMount"]] == ["work"]
    assert retries(spec, "train")["maxRetryCount"] == 5
    variables = {entry["name"]: entry["value"] for entry in container(spec, "train")["env"]}
    wanted = {"SVIP_NODES": "2", "SVIP_PROCESSES": "4", "SVIP_NODE_CPU": "8", "SVIP_NODE_MEMORY": "64Gi", "A": "1"}
    assert (wanted | {"SVIP_NODE_GPUS": "4"}).items() <= variables.items()


@pytest.mark.parametrize(("given", "asked"), [("{}", 4), ("{gpus: null}", 4), ("{gpus: 0}", 0), ("{gpus: 2}", 2)])
def test_nodes_ask_for_a_gpu_for_each_process_unless_told_otherwise(
    given: str, asked: int, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kubeflow", reason="needs the extra `cluster`")
    spec, _ = compiled(f"training: {{nodes: 2, processes: 4}}\nsteps: {{train: {given}}}")
    monkeypatch.delenv("SVIP_NODE_GPUS", raising=False)
    for entry in container(spec, "train")["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", ""))
    training = trainjob.Training("s3://team/bundle", "s3://team/words", "s3://team/work", [], load_config("smoke", []))
    trainer = trainjob.render(training, 2, int(os.environ["SVIP_PROCESSES"])).to_dict()["spec"]["trainer"]
    assert trainer["numProcPerNode"] == 4
    assert trainer.get("resourcesPerNode", {}).get("limits", {}).get("nvidia.com/gpu", 0) == asked


def test_the_last_step_can_find_the_trainjobs_of_its_run(compiled: Compiled) -> None:
    spec, platform = compiled("namespace: team\ntraining: {nodes: 2}")
    (label,) = executors_of(platform)["exec-train"]["fieldPathAsEnv"]
    assert label == {"name": "SVIP_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
    variables = {entry["name"]: entry["value"] for entry in container(spec, "close-run")["env"]}
    assert variables == {"SVIP_NODES": "2", "SVIP_NAMESPACE": "team"}
    assert "env" not in container(compiled("namespace: team")[0], "close-run"), "it asks no cluster for one node's"


def test_tuning_knows_no_nodes_and_keeps_its_gpus(compiled: Compiled) -> None:
    spec, _ = compiled("training: {nodes: 2}\nsteps: {tune: {gpus: 4}}", name="tuning")
    assert container(spec, "tune")["resources"]["accelerator"]["resourceCount"] == "4"
    variables = {entry["name"]: entry["value"] for entry in container(spec, "tune")["env"]}
    assert variables["SVIP_PROCESSES"] == "4"
    assert "SVIP_NODES" not in variables
    assert {"name": "SVIP_NODES", "value": "2"} in container(spec, "train")["env"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imag: x", "cluster.yaml: unknown key 'imag'; did you mean 'image'?"),
        ("training: {node: 2}", "unknown key 'training.node'; did you mean 'nodes'?"),
        ("steps: {trian: {}}", "unknown key 'steps.trian'; did you mean 'train'?"),
        ("steps: {train: {gpu: 1}}", "unknown key 'steps.train.gpu'; did you mean 'gpus'?"),
        ("steps: {train: {gpus: many}}", "cluster.yaml: gpus: Value 'many' of type 'str' could not be converted"),
        ("steps: {train: {gpus: -1}}", "steps.train.gpus=-1: expected at least 0"),
        ("steps: {train: {memory: 8 GB}}", "steps.train.memory='8 GB': expected bytes with a unit, such as 8Gi"),
        ("steps: {default: {cpu: two}}", "steps.default.cpu='two': expected a number of CPUs, such as 4 or 500m"),
        ("steps: {train: {volumes: {work: data}}}", "steps.train.volumes.work='data': expected an absolute folder"),
        ("steps: {train: {tolerations: [{effect: Never}]}}", "expected operator Equal or Exists and effect NoSchedule"),
        ("steps: [train]", "steps: expected a mapping, found list"),
        ("training: {nodes: 0}", "training.nodes=0: expected at least 1"),
        ("training: {work: training}", "training.work='training': expected an absolute folder or s3://bucket/prefix"),
        (
            "training: {nodes: 2}\nsteps: {train: {gpus: 1, gpu_type: amd.com/gpu}}",
            "steps.train.cpu: expected CPUs, which a TrainJob needs beside amd.com/gpu",
        ),
        ("- image", "expected a mapping, found list"),
        ("image: [", "is not a readable YAML file"),
    ],
)
def test_a_file_that_can_not_be_meant_is_refused_with_the_field(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        load_cluster(written(tmp_path, text))
    assert message in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.yaml does not exist; infra/cluster.yaml is one to copy"):
        load_cluster(tmp_path / "nowhere.yaml")


def test_every_field_is_explained_in_the_shipped_file() -> None:
    from dataclasses import fields

    from pipelines import settings

    text = SHIPPED.read_text()
    for node in (settings.Cluster, settings.Training, settings.Step):
        for field in fields(node):
            assert f"\n{field.name}:" in text or f" {field.name}:" in text, f"{field.name} is not in infra/cluster.yaml"
    assert set(yaml.safe_load(text)["steps"]) - {"default"} <= set(step_names())


def test_an_image_without_a_tag_of_its_own_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for image, warned in (
        ("r.io:5000/svip", True),
        ("svip:latest", True),
        ("svip:1", False),
        ("svip@sha256:ab", False),
    ):
        caplog.clear()
        load_cluster(written(tmp_path, f"image: {image}"))
        assert ("cache can't tell its builds apart" in caplog.text) == warned, image


def test_parameters_become_the_defaults_and_strange_ones_are_refused(tmp_path: Path) -> None:
    compile_pipeline("experiment", tmp_path / "out.yaml", parameters={"preset": "paper/cub"})
    spec, _ = read_strictly(tmp_path / "out.yaml")
    assert spec["root"]["inputDefinitions"]["parameters"]["preset"]["defaultValue"] == "paper/cub"
    with pytest.raises(PipelineError, match="pipeline experiment has no seeds; leave out --seeds"):
        compile_pipeline("experiment", tmp_path / "other.yaml", parameters={"seeds": 2})
    with pytest.raises(ValueError, match="unknown variant 'no_pcs'; did you mean 'no_psc'"):
        compile_pipeline("ablation", tmp_path / "other.yaml", parameters={"variants": ["no_pcs"]})
    with pytest.raises(ValueError, match="unknown search space 'smok'; did you mean 'smoke'"):
        compile_pipeline("tuning", tmp_path / "other.yaml", parameters={"space": "smok"})
    assert not (tmp_path / "other.yaml").exists()


def test_a_compiled_file_has_the_preset_and_changes_it_was_given(tmp_path: Path) -> None:
    out, svip = str(tmp_path / "out.yaml"), CliRunner()
    given = ["--preset", "paper/cub", "optim.lr=1e-5", "--variants", "baseline,full", "--seeds", "3"]
    done = svip.invoke(app, ["compile", "ablation", *given, "--out", out], catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout.startswith(f"{out}: pipeline ablation, image ")
    spec, _ = read_strictly(Path(out))
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert {name: entry["defaultValue"] for name, entry in inputs.items() if name != "continues"} == {
        "preset": "paper/cub",
        "overrides": ["optim.lr=1e-5"],
        "variants": ["baseline", "full"],
        "seeds": 3,
    }
    wrong = svip.invoke(app, ["compile", "ablation", "optim.rl=1e-5", "--out", str(tmp_path / "none.yaml")])
    assert isinstance(wrong.exception, ConfigError) and not (tmp_path / "none.yaml").exists()


def test_no_command_loads_kfp_before_it_is_needed() -> None:
    code = (
        "import sys, pipelines.cli; print([name for name in ('kfp', 'kfp_server_api', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
