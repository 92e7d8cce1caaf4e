"""Who may reach whom by the NetworkPolicies, worked out as Kubernetes defines it and held against a table."""

from __future__ import annotations

import ipaddress

import pytest
from manifests import INFRA, Object, build, matches, pods

HERE = {"kubernetes.io/metadata.name": "svip"}
ELSEWHERE = {"kubernetes.io/metadata.name": "other"}
INGRESS = {"kubernetes.io/metadata.name": "ingress", "svip/reaches-mlflow": "true"}

Place = tuple[dict[str, str], dict[str, str]] | str
"""Labels of a namespace and of a pod in it, or an address outside of the cluster."""


@pytest.fixture(scope="module")
def policies() -> list[Object]:
    return [thing for thing in build(INFRA / "k8s/overlays/dev") if thing["kind"] == "NetworkPolicy"]


@pytest.fixture(scope="module")
def places() -> dict[str, Place]:
    made = {name: template["metadata"]["labels"] for name, template in pods(build(INFRA / "k8s/overlays/dev"))}
    step = {"pipelines.kubeflow.org/v2_component": "true", "pipeline/runid": "1"}
    return {
        **{name.removeprefix("svip-"): (HERE, labels) for name, labels in made.items()},
        "step": (HERE, step),
        "stranger": (HERE, {"app": "stranger"}),
        "step elsewhere": (ELSEWHERE, step),
        "training elsewhere": (ELSEWHERE, made["training"]),
        "controller": (INGRESS, {"app.kubernetes.io/name": "ingress-nginx"}),
        "internet": "198.51.100.7",
    }


def test_the_table(policies: list[Object], places: dict[str, Place]) -> None:
    servers = {"mlflow": 5000, "postgres": 5432, "s3": 8333}
    reached = {
        name: {other for other in places if _reaches(policies, places[other], places[name], port)}
        for name, port in servers.items()
    }
    assert reached == {
        "mlflow": {"training", "step", "controller", "mlflow-user"},
        "postgres": {"mlflow", "step"},
        "s3": {"mlflow", "training", "step", "s3-buckets"},
    }


def test_servers_answer_on_no_other_port(policies: list[Object], places: dict[str, Place]) -> None:
    for name in ("mlflow", "postgres", "s3"):
        for port in (22, 8080, 9333, 18333, 18888):
            assert not [other for other in places if _reaches(policies, places[other], places[name], port)]


def test_ranks_reach_each_other_on_any_port_and_nobody_else_reaches_them(
    policies: list[Object], places: dict[str, Place]
) -> None:
    for port in (29500, 1024, 65535):
        assert {name for name in places if _reaches(policies, places[name], places["training"], port)} == {"training"}


def test_who_reaches_the_internet(policies: list[Object], places: dict[str, Place]) -> None:
    made = ("mlflow", "mlflow-user", "postgres", "s3", "s3-buckets", "training", "work")
    out = {
        port: {name for name in made if _reaches(policies, places[name], places["internet"], port)}
        for port in (443, 80, 6000)
    }
    # MLflow to an S3 outside of the cluster; training to that, and to weights and data
    assert out == {443: {"mlflow", "training"}, 80: {"training"}, 6000: {"training"}}


def test_all_can_resolve_names(policies: list[Object], places: dict[str, Place]) -> None:
    dns: Place = ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})
    for name in ("mlflow", "mlflow-user", "s3", "s3-buckets", "training"):
        for protocol in ("UDP", "TCP"):
            assert _reaches(policies, places[name], dns, 53, protocol), name


def test_pods_of_others_in_the_namespace_are_left_alone(policies: list[Object], places: dict[str, Place]) -> None:
    assert _reaches(policies, places["internet"], places["stranger"], 80)
    assert _reaches(policies, places["stranger"], places["internet"], 80)
    assert _reaches(policies, places["stranger"], places["step"], 80)


def _reaches(policies: list[Object], source: Place, target: Place, port: int, protocol: str = "TCP") -> bool:
    return _lets(policies, "Egress", source, target, port, protocol) and _lets(
        policies, "Ingress", target, source, port, protocol
    )


def _lets(policies: list[Object], way: str, pod: Place, peer: Place, port: int, protocol: str) -> bool:
    """Whether the policies on ``pod`` let it send to, or receive from, ``peer``: all may where no policy selects it."""
    if isinstance(pod, str) or pod[0] != HERE:
        return True
    selecting = [
        policy["spec"]
        for policy in policies
        if way in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod[1])
    ]
    side = "from" if way == "Ingress" else "to"
    return not selecting or any(
        _has_port(rule, port, protocol) and _has_peer(rule.get(side), peer)
        for spec in selecting
        for rule in spec.get(way.lower(), [])
    )


def _has_port(rule: Object, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any((entry["port"], entry["protocol"]) == (port, protocol) for entry in ports)


def _has_peer(peers: list[Object] | None, place: Place) -> bool:
    """No peers at all mean everybody."""
    return not peers or any(_is_peer(peer, place) for peer in peers)


def _is_peer(peer: Object, place: Place) -> bool:
    if "ipBlock" in peer:  # what it says of a pod's own address is left to the network: taken for outside ones only
        assert set(peer["ipBlock"]) == {"cidr"}
        network = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return isinstance(place, str) and ipaddress.ip_address(place) in network
    if isinstance(place, str):
        return False
    namespace, labels = place
    in_namespace = matches(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else namespace == HERE
    return in_namespace and matches(peer.get("podSelector", {}), labels)
