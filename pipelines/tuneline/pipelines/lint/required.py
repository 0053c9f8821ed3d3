"""Lint checks for values that a document must set.

The checks apply to KFP executors, complete pods, service accounts, secrets and generators of
secrets. The rules are listed in `lint.py`. Documents may have any shape: a value that should be a
mapping or a list but is neither counts as empty.
"""

from collections.abc import Iterator
from typing import Any

from tuneline.runtime.secrets import find_secrets, mask

Problems = Iterator[tuple[str, str, str, str]]
"""Problems as (path, rule, value, fix), the fields of a Finding."""


def check_executors(pipeline: dict[str, Any], platform: dict[str, Any]) -> Problems:
    """Check KFP executors: resources in the pipeline, and the user in the platform document."""
    kubernetes = mapping(platform, "platforms", "kubernetes", "deploymentSpec", "executors")
    for name, executor in mapping(pipeline, "deploymentSpec", "executors").items():
        if "container" not in mapping(executor):
            continue
        path = f"deploymentSpec.executors.{name}"
        resources = mapping(executor, "container", "resources")
        absent = [
            resource
            for key, resource in {
                "CpuRequest": "CPU request",
                "CpuLimit": "CPU limit",
                "MemoryRequest": "memory request",
                "MemoryLimit": "memory limit",
            }.items()
            if not resources.get(f"resource{key}") and not resources.get(key[0].lower() + key[1:])
        ]
        if absent:
            fix = "set_cpu_request, set_cpu_limit, set_memory_request, set_memory_limit"
            yield f"{path}.container.resources", "resources", f"no {', no '.join(absent)}", fix
        if "runAsNonRoot" not in mapping(kubernetes, name, "securityContext"):
            fix = "kfp.kubernetes.set_security_context(task, run_as_user=..., run_as_non_root=True)"
            yield path, "root-user", "runAsNonRoot is not set", fix


def check_resource(document: dict[str, Any]) -> Problems:
    """Check a service account, a secret, or a kustomization that generates secrets."""
    kind = document.get("kind")
    if kind == "ServiceAccount" and "automountServiceAccountToken" not in document:
        fix = "set it to false, or to true if its pods call the Kubernetes API"
        yield "automountServiceAccountToken", "automount", "not set, which means true", fix
    if kind == "Secret":
        fix = "keep values out of files: kubectl create secret, or an external store"
        for part in ("data", "stringData"):
            for name, value in mapping(document, part).items():
                # `lint` has already reported a token of a known form.
                if value and not find_secrets(str(value)):
                    yield f"{part}.{name}", "secret-value", mask(str(value)), fix
    if kind == "Kustomization":
        fix = "name a file that is not committed (envs, files)"
        for index, generator in enumerate(_list(document.get("secretGenerator"))):
            for literal in _list(mapping(generator).get("literals")):
                name, _, value = str(literal).partition("=")
                if value:
                    path = f"secretGenerator[{index}].literals"
                    yield path, "secret-value", f"{name}={mask(value)}", fix


def check_pod(path: str, pod: dict[str, Any]) -> Problems:
    """Check the pod spec at `path`, in a pod or in a pod template."""
    prefix = f"{path}." if path else ""
    containers = [
        (f"{prefix}{part}[{index}]", container)
        for part in ("containers", "initContainers")
        for index, container in enumerate(_list(pod.get(part)))
        if isinstance(mapping(container).get("image"), str)
    ]
    if not containers:
        return
    account = pod.get("serviceAccountName")
    if pod.get("automountServiceAccountToken") is not False and account in (None, "", "default"):
        fix = "set it to false, or name a service account with the permissions the pod needs"
        where = f"{prefix}automountServiceAccountToken"
        yield where, "automount", "a token of the default service account", fix
    for where, container in containers:
        context = mapping(container, "securityContext")
        if "runAsNonRoot" not in {**mapping(pod, "securityContext"), **context}:
            fix = "set runAsNonRoot: true and a numeric runAsUser"
            yield f"{where}.securityContext", "root-user", "runAsNonRoot is not set", fix
        if "allowPrivilegeEscalation" not in context:
            fix = "set allowPrivilegeEscalation: false"
            yield f"{where}.securityContext", "privilege-escalation", "not set", fix
        absent = [
            f"no {name} {part.removesuffix('s')}"
            for part in ("requests", "limits")
            for name in ("cpu", "memory")
            if not mapping(container, "resources", part).get(name)
        ]
        if absent:
            fix = "set requests and limits for cpu and memory"
            yield f"{where}.resources", "resources", ", ".join(absent), fix


def mapping(node: Any, *keys: str) -> dict[str, Any]:
    """Return the mapping at `keys` in nested mappings, or an empty mapping if there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _list(node: Any) -> list[Any]:
    return node if isinstance(node, list) else []
