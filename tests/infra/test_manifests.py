"""The Kubernetes manifests, as kustomize builds them: valid, consistent within, and as closed as they say."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import BUILDS, INFRA, Object, build, build_site, matches, named, names, pods

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs pip install kubernetes-validate")

# the oldest Kubernetes that Kubeflow Trainer 2.3 runs on, and the newest whose schemas are known here
VERSIONS = ("1.31", "1.37")
# of which the project makes no objects, with what its steps and the documentation read in them
SECRETS = {
    "svip-mlflow": {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    "svip-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "svip-tuning": {"SVIP_TUNING_STORAGE"},
    "svip-server": {
        *("POSTGRES_PASSWORD", "MLFLOW_DB_PASSWORD", "OPTUNA_DB_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
        *("MLFLOW_ADMIN_USERNAME", "MLFLOW_ADMIN_PASSWORD"),
    },
}


@pytest.fixture(params=BUILDS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return build(INFRA / "k8s" / request.param)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Object, ...]:
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(objects: tuple[Object, ...], version: str) -> None:
    for thing in objects:
        if thing["kind"] != "TrainingRuntime":
            kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field_of_a_training_pod(objects: tuple[Object, ...], version: str) -> None:
    (template,) = [template for name, template in pods(objects) if name == "training"]
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "PodTemplate", "template": template}, version, strict=True
    )


def test_a_field_that_kubernetes_does_not_have_is_found() -> None:
    thing = copy.deepcopy(named(build(INFRA / "k8s/base"), "Deployment", "svip-mlflow"))
    thing["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(thing, VERSIONS[-1], strict=True)


def test_trainer_knows_every_field_of_the_runtime(objects: tuple[Object, ...]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra `cluster`")
    runtime = named(objects, "TrainingRuntime", "svip")
    # its models drop what they don't know
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime


def test_the_runtime_is_one_that_the_kubeflow_sdk_finds(objects: tuple[Object, ...]) -> None:
    utils = pytest.importorskip("kubeflow.trainer.backends.kubernetes.utils", reason="needs the extra `cluster`")
    runtime = named(objects, "TrainingRuntime", "svip")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra `cluster`")
    trainer = utils.get_runtime_trainer(
        runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"],
        [models.JobsetV1alpha2ReplicatedJob.from_dict(job)],
        models.TrainerV1alpha1MLPolicy.from_dict(runtime["spec"]["mlPolicy"]),
    )
    assert (trainer.framework, trainer.num_nodes) == ("torch", 1)
    assert trainer.image.startswith("svip:")


@pytest.mark.parametrize("overlay", ["overlays/dev", "overlays/gpu"])
def test_what_pods_refer_to_is_there(overlay: str, tmp_path: Path) -> None:
    objects = build_site(tmp_path, overlay)
    keys = {
        (thing["kind"], thing["metadata"]["name"]): set(thing.get("data", {}))
        for thing in objects
        if thing["kind"] in ("Secret", "ConfigMap")
    }
    claims = names(objects, "PersistentVolumeClaim")
    for workload, template in pods(objects):
        spec = template["spec"]
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in keys, workload
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, workload
        for container in spec["containers"]:
            for kind, name, key in _read_by(container):
                assert (kind, name) in keys, (workload, name)
                assert key is None or key in keys[kind, name], (workload, name, key)


def _read_by(container: Object) -> list[tuple[str, str, str | None]]:
    """Kind, name and key (None: all) of what its environment comes from."""
    kinds = {"secretRef": "Secret", "configMapRef": "ConfigMap"}
    found: list[tuple[str, str, str | None]] = []
    for source in container.get("envFrom", []):
        found += [(kinds[kind], reference["name"], None) for kind, reference in source.items()]
    for entry in container.get("env", []):
        if reference := entry.get("valueFrom", {}).get("secretKeyRef"):
            found.append(("Secret", reference["name"], reference["key"]))
    return found


def test_the_example_has_the_secrets_that_the_steps_read(site: tuple[Object, ...]) -> None:
    assert {name: set(named(site, "Secret", name)["data"]) for name in names(site, "Secret")} == SECRETS


def test_no_secret_is_in_the_repository(objects: tuple[Object, ...]) -> None:
    assert names(objects, "Secret") == set()
    for path in (INFRA / "k8s").rglob("*"):
        assert path.suffix != ".env", path


def test_the_example_is_all_in_one_namespace_that_it_does_not_own(site: tuple[Object, ...]) -> None:
    assert {thing["metadata"].get("namespace") for thing in site} == {"kubeflow"}
    binding = named(site, "RoleBinding", "svip-pipeline")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "svip-pipeline", "namespace": "kubeflow"}]


def test_the_example_sets_the_image_everywhere(site: tuple[Object, ...]) -> None:
    images = {container["image"] for _, template in pods(site) for container in template["spec"]["containers"]}
    assert images == {"registry.example.com/team/svip:0.1.0", "postgres:17.10-bookworm"}


def test_selectors_select(objects: tuple[Object, ...]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in pods(objects)}
    for thing in objects:
        selector = thing.get("spec", {}).get("selector")
        if thing["kind"] == "Service":
            assert [name for name in labels if matches({"matchLabels": selector}, labels[name])] == [
                thing["metadata"]["name"]
            ]
        elif thing["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            assert [name for name in labels if matches(selector, labels[name])] == [thing["metadata"]["name"]]
        elif thing["kind"] == "NetworkPolicy":
            assert any(matches(thing["spec"]["podSelector"], of_pod) for of_pod in labels.values())


def test_ports_by_name_are_there(objects: tuple[Object, ...]) -> None:
    ports = {
        name: {port["name"] for container in template["spec"]["containers"] for port in container.get("ports", [])}
        for name, template in pods(objects)
    }
    for thing in objects:
        if thing["kind"] == "Service":
            assert {port["targetPort"] for port in thing["spec"]["ports"]} <= ports[thing["metadata"]["name"]]
        if thing["kind"] == "StatefulSet":
            assert thing["spec"]["serviceName"] in names(objects, "Service")
    for name, template in pods(objects):
        for container in template["spec"]["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "httpGet" in container.get(probe, {}):
                    assert container[probe]["httpGet"]["port"] in ports[name]


def test_volumes_are_mounted_and_mounts_are_volumes(objects: tuple[Object, ...]) -> None:
    claims = {
        thing["metadata"]["name"]: {
            claim["metadata"]["name"] for claim in thing["spec"].get("volumeClaimTemplates", [])
        }
        for thing in objects
        if thing["kind"] == "StatefulSet"
    }
    for name, template in pods(objects):
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])} | claims.get(name, set())
        mounts = [mount for one in template["spec"]["containers"] for mount in one.get("volumeMounts", [])]
        assert {mount["name"] for mount in mounts} == volumes, name


def test_pods_keep_to_the_restricted_standard(objects: tuple[Object, ...]) -> None:
    for name, template in pods(objects):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name


def test_pods_say_what_they_need(objects: tuple[Object, ...]) -> None:
    for name, template in pods(objects):
        for container in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
            assert "memory" in container["resources"]["limits"], name


def test_images_are_pinned(objects: tuple[Object, ...]) -> None:
    for _, template in pods(objects):
        for container in template["spec"]["containers"]:
            name, _, tag = container["image"].rpartition(":")
            assert name and (tag != "latest" or name == "svip"), container["image"]


def test_steps_may_do_what_training_over_nodes_takes_and_no_more(objects: tuple[Object, ...]) -> None:
    allowed = {
        (group, resource, verb)
        for rule in named(objects, "Role", "svip-pipeline")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if "resourceNames" not in rule
    }
    trainer = "trainer.kubeflow.org"
    assert allowed == {
        *((trainer, "trainjobs", verb) for verb in ("create", "get", "list", "watch", "patch", "delete")),
        *((trainer, "trainingruntimes", verb) for verb in ("get", "list")),
        *(("", thing, verb) for thing in ("pods", "pods/log", "events") for verb in ("get", "list", "watch")),
        *(("argoproj.io", "workflowtaskresults", verb) for verb in ("create", "patch")),
    }


def test_the_outbox_is_on_the_shared_volume(objects: tuple[Object, ...]) -> None:
    (template,) = [template for name, template in pods(objects) if name == "training"]
    (container,) = template["spec"]["containers"]
    step = yaml.safe_load((INFRA / "cluster.yaml").read_text())["steps"]["default"]
    outbox = {entry["name"]: entry.get("value") for entry in container["env"]}["SVIP_OUTBOX"]
    assert outbox == step["env"]["SVIP_OUTBOX"]
    assert {"name": "work", "mountPath": step["volumes"]["svip-work"]} in container["volumeMounts"]
    assert Path(outbox).is_relative_to(step["volumes"]["svip-work"])


def test_the_folders_of_the_steps_are_made_on_the_shared_volume(objects: tuple[Object, ...], tmp_path: Path) -> None:
    job = named(objects, "Job", "svip-work")
    spec = job["spec"]["template"]["spec"]
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsUser"] == 1000
    (container,) = spec["containers"]
    (command,) = container["args"]
    made = subprocess.run([*container["command"], command.replace("/work/", f"{tmp_path}/")])
    assert made.returncode == 0
    settings = yaml.safe_load((INFRA / "cluster.yaml").read_text())
    wanted = [settings["training"]["work"], settings["steps"]["default"]["env"]["SVIP_OUTBOX"]]
    assert sorted(f"/work/{path.name}" for path in tmp_path.iterdir()) == sorted(wanted)


def test_a_job_goes_away_so_that_another_image_can_be_applied(objects: tuple[Object, ...]) -> None:
    jobs = [thing for thing in objects if thing["kind"] == "Job"]
    assert jobs and all(job["spec"]["ttlSecondsAfterFinished"] <= 600 for job in jobs)


def test_a_gpu_node_trains_with_its_gpu_and_enough_shared_memory() -> None:
    (template,) = [template for name, template in pods(build(INFRA / "k8s/overlays/gpu")) if name == "training"]
    spec: dict[str, Any] = template["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    memory = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if "emptyDir" in volume}
    assert memory == {"workspace": "50Gi", "tmp": "20Gi", "shm": "16Gi"}
    assert {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "shm"} == {
        "/dev/shm"
    }


def test_a_budget_never_keeps_a_node_from_being_drained(objects: tuple[Object, ...]) -> None:
    for thing in objects:
        if thing["kind"] == "PodDisruptionBudget":
            replicas = named(objects, "Deployment", thing["metadata"]["name"])["spec"]["replicas"]
            assert replicas > thing["spec"]["minAvailable"]
            assert thing["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow", "not by pods that don't start either"


def test_names_in_the_cluster_file_are_those_of_the_manifests(site: tuple[Object, ...]) -> None:
    path = INFRA / "cluster.yaml"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    known = {thing["metadata"]["name"] for thing in site}
    assert {text for text in _strings(yaml.safe_load(path.read_text())) if text.startswith("svip-")} <= known


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []
