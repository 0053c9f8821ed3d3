"""Who may talk to whom under the network policies, by the rules of the Kubernetes API.

The evaluator follows the API's reference of NetworkPolicy (networking.k8s.io/v1): policies that
select a pod add up, a rule matches if a peer and a port match, an absent list of peers or ports
matches all, and the port is that of the pod behind a service. The reference leaves to the network
plugin whether an address block applies to pods. A connection counts as open only if it is open
without that, and as closed only if it is closed with it.
"""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneline.pods import PART_OF_LABEL
from tuneline.train.trainjob.manifest import NODE_LABELS

MANIFESTS = Path(__file__).parents[2] / "manifests"
OWN = "tuneline"
STEP = {**dict([PART_OF_LABEL]), "app.kubernetes.io/component": "evaluate"}
POLICIES: list[dict[str, Any]] = [
    yaml.safe_load((MANIFESTS / path / "network-policy.yaml").read_text(encoding="utf-8"))
    for path in ("base", "components/trainer", "components/monitoring")
]


@dataclass(frozen=True)
class Peer:
    """The other end of a connection: a pod, or an address outside the pods' network."""

    ip: str
    namespace: str = ""
    """Empty if the address is not that of a pod, such as a process in a node's network."""
    labels: dict[str, str] = field(default_factory=dict)


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert not set(selector) - {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def in_block(block: dict[str, Any], ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return address in ipaddress.ip_network(block["cidr"]) and not any(
        address in ipaddress.ip_network(excepted) for excepted in block.get("except", [])
    )


def is_peer(selector: dict[str, Any], peer: Peer, *, blocks_apply_to_pods: bool) -> bool:
    assert selector, "an empty peer is invalid"
    if "ipBlock" in selector:
        assert set(selector) == {"ipBlock"}
        applies = blocks_apply_to_pods or not peer.namespace
        return applies and in_block(selector["ipBlock"], peer.ip)
    if not peer.namespace:
        return False
    if "namespaceSelector" in selector:
        labels = {"kubernetes.io/metadata.name": peer.namespace}
        if not matches(selector["namespaceSelector"], labels):
            return False
    elif peer.namespace != OWN:
        return False
    return matches(selector.get("podSelector", {}), peer.labels)


def allows(
    direction: str,
    pod: dict[str, str],
    peer: Peer,
    protocol: str,
    port: int,
    *,
    blocks_apply_to_pods: bool,
) -> bool:
    kind, ends = {"egress": ("Egress", "to"), "ingress": ("Ingress", "from")}[direction]
    selecting = [
        policy["spec"]
        for policy in POLICIES
        if kind in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], pod)
    ]
    assert selecting, "no policy isolates the pod"
    for rule in (rule for policy in selecting for rule in policy.get(direction, [])):
        peers, ports = rule.get(ends), rule.get("ports")
        is_end = not peers or any(
            is_peer(each, peer, blocks_apply_to_pods=blocks_apply_to_pods) for each in peers
        )
        is_port = not ports or any(
            (each.get("protocol", "TCP"), each.get("port", port)) == (protocol, port)
            for each in ports
        )
        if is_end and is_port:
            return True
    return False


def is_open(pod: dict[str, str], peer: Peer, protocol: str, port: int) -> bool:
    return allows("egress", pod, peer, protocol, port, blocks_apply_to_pods=False)


def is_closed(pod: dict[str, str], peer: Peer, protocol: str, port: int) -> bool:
    return not allows("egress", pod, peer, protocol, port, blocks_apply_to_pods=True)


COREDNS = Peer("10.244.0.5", "kube-system", {"k8s-app": "kube-dns"})
OPENSHIFT_DNS = Peer("10.128.0.7", "openshift-dns", {"dns.operator.openshift.io/daemonset-dns": ""})
NODE_LOCAL = Peer("169.254.20.10")
METADATA = Peer("169.254.169.254")
IN_KUBEFLOW = Peer("10.244.0.9", "kubeflow", {"app": "any"})
OPENDATAHUB = Peer("10.244.0.11", "opendatahub", {"app": "mlflow"})
OTHER_TEAM = Peer("10.244.3.3", "other", {"app": "web"})
HUB = Peer("18.164.174.23")


@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
@pytest.mark.parametrize(
    ("server", "port"),
    [
        (COREDNS, 53),
        (NODE_LOCAL, 53),
        # NodeLocal DNSCache on the address of the DNS service: EKS, kubeadm, GKE, IPv6.
        *[(Peer(ip), 53) for ip in ("172.20.0.10", "10.96.0.10", "100.64.0.10", "fd12:3::a")],
        (OPENSHIFT_DNS, 5353),
    ],
)
def test_names_are_looked_up_on_every_platform(server: Peer, port: int, protocol: str) -> None:
    for pod in (STEP, NODE_LABELS):
        assert is_open(pod, server, protocol, port)
        assert is_closed(pod, server, protocol, 80)


@pytest.mark.parametrize(
    ("server", "port"),
    [
        (IN_KUBEFLOW, 8080), (IN_KUBEFLOW, 8887), (IN_KUBEFLOW, 8888),
        (IN_KUBEFLOW, 9000), (IN_KUBEFLOW, 8333),
        # MLflow as KFP 2.17 names it by default (apiserver/config/config.json), as KFP's own tests
        # install it there, and beside KFP.
        (OPENDATAHUB, 8443), (OPENDATAHUB, 5000), (IN_KUBEFLOW, 5000),
        (HUB, 443), (Peer("2600:9000:2000::1"), 443), (Peer("10.99.0.1"), 6443),
    ],
)  # fmt: skip
def test_what_a_step_needs_is_open(server: Peer, port: int) -> None:
    assert is_open(STEP, server, "TCP", port)
    assert is_closed(STEP, server, "UDP", port)


@pytest.mark.parametrize("port", [53, 80, 443, 5353, 6443, 8080, 29500])
@pytest.mark.parametrize(
    "server", [METADATA, Peer("fd00:ec2::254"), Peer("fd20:ce::254"), Peer("fe80::a9fe:a9fe")]
)
def test_metadata_services_stay_closed(server: Peer, port: int) -> None:
    for pod in (STEP, NODE_LABELS):
        for protocol in ("TCP", "UDP"):
            assert is_closed(pod, server, protocol, port)


def test_other_pods_and_ports_stay_closed() -> None:
    for port in (80, 5000, 5432, 8080, 8443):
        assert is_closed(STEP, OTHER_TEAM, "TCP", port)
    assert is_closed(STEP, HUB, "TCP", 80)
    assert is_closed(STEP, Peer("8.8.8.8"), "UDP", 53)
    assert is_closed(STEP, IN_KUBEFLOW, "TCP", 3306)
    assert is_closed(STEP, NODE_LOCAL, "TCP", 443)


def test_only_the_exit_handler_reaches_the_pushgateway() -> None:
    gateway = Peer("10.244.4.4", "monitoring", {"app": "pushgateway"})
    exit_handler = {**STEP, "app.kubernetes.io/component": "diagnose"}
    assert is_open(exit_handler, gateway, "TCP", 9091)
    assert is_closed(STEP, gateway, "TCP", 9091)
    for port in (80, 9090):
        assert is_closed(exit_handler, gateway, "TCP", port)


def test_only_the_nodes_of_a_training_accept_connections_and_only_from_each_other() -> None:
    node = Peer("10.244.1.1", OWN, NODE_LABELS)
    others = [Peer("10.244.1.2", OWN, STEP), OTHER_TEAM, HUB]
    for port in (443, 29500, 45123):
        for end in ("egress", "ingress"):
            assert allows(end, NODE_LABELS, node, "TCP", port, blocks_apply_to_pods=False)
        for peer in (node, *others):
            assert not allows("ingress", STEP, peer, "TCP", port, blocks_apply_to_pods=True)
        for peer in others:
            assert not allows("ingress", NODE_LABELS, peer, "TCP", port, blocks_apply_to_pods=True)
    assert is_closed(NODE_LABELS, others[0], "TCP", 29500)
