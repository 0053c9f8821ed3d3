"""Check compiled pipelines and Kubernetes manifests for settings that must not reach a cluster.

    secret-value          a credential in the document instead of a reference to a secret
    image-tag             an image without tag or digest, or with `latest`; KFP caches by image name
    privileged            a privileged container
    privilege-escalation  a container that does not forbid it (in pipelines, KFP forbids it)
    host-path             a volume on the node's own disk
    host-namespace        hostNetwork, hostPID or hostIPC
    root-user             user 0, or a pod that does not set runAsNonRoot
    resources             a container without requests and limits for CPU and memory
    automount             an API token in a pod that does not use one
    pip-install           packages installed when the pod starts: not pinned, not air-gapped
    list-into-dag         a list of artifacts into a condition, loop or nested pipeline of KFP
    local-file            a dataset or model that is a path of this machine
    claim                 a dataset or model on a claim that no task mounts
    replaced-text         a text in a pipeline that Kubernetes, Argo or KFP would replace

Forbidden values are searched for in the whole document, so custom resources and kustomize patches
are covered. Missing values are reported only for complete pods and KFP executors, because a patch
may leave out what its base sets.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuneline.bounded_yaml import load_documents
from tuneline.errors import DataError, RecipeError
from tuneline.pipelines.lint.data import check_data
from tuneline.pipelines.lint.passing import check_lists, check_texts
from tuneline.pipelines.lint.required import (
    Problems,
    check_executors,
    check_pod,
    check_resource,
    mapping,
)
from tuneline.runtime.secrets import find_secrets, is_credential_name, mask, mask_within

MAX_SHOWN_CHARACTERS = 80

PIP_INSTALL = re.compile(
    r"\b(?:pip[0-9.]*|uv(?:[\"',\s]+pip)?|conda|mamba)[\"',\s]+(?:-[^\s]+\s+)*(?:install|sync)\b"
)


@dataclass(frozen=True)
class Finding:
    """A violation of a rule."""

    document: int
    """Number of the document in the file, starting at 1."""
    path: str
    """Path of the value in the document, e.g. spec.template.spec.containers[0].image."""
    rule: str
    value: str
    """The value, or what is missing; a credential is masked."""
    fix: str
    """What to change."""

    def __str__(self) -> str:
        return f"document {self.document}, {self.path}: {self.rule}: {self.value}; {self.fix}"


def lint_file(path: str | Path) -> list[Finding]:
    """Check every document of a YAML or JSON file.

    Raises:
        RecipeError: the file is unreadable, or holds neither a compiled pipeline nor manifests.
    """
    try:
        documents = load_documents(Path(path).read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error.reason}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except DataError as error:
        raise RecipeError(str(error)) from None
    try:
        return lint_documents(documents)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def lint_documents(documents: list[Any]) -> list[Finding]:
    """Check the documents of one file; those of a compiled pipeline are checked together.

    Raises:
        RecipeError: there is no document, or a document is of an unknown kind.
    """
    numbered = [(number, doc) for number, doc in enumerate(documents, 1) if doc is not None]
    if not numbered:
        raise RecipeError(
            "the file contains no YAML document: give a compiled pipeline or a manifest"
        )
    platform: dict[str, Any] = next((doc for _, doc in numbered if _is_platform(doc)), {})
    findings = []
    for number, document in numbered:
        findings += [Finding(number, *problem) for problem in _lint(document, platform)]
    return findings


def _lint(document: Any, platform: dict[str, Any]) -> Problems:
    if not isinstance(document, dict) or not (
        _is_pipeline(document) or _is_platform(document) or "kind" in document
    ):
        raise RecipeError(
            "neither a compiled KFP pipeline (pipelineInfo) nor a Kubernetes resource (kind): "
            "compile a recipe with `tuneline compile`, then check the file that it writes"
        )
    for path, key, value, parent in _walk(document):
        yield from _check_value(path, key, value, parent)
    if _is_pipeline(document):
        yield from check_executors(document, platform)
        yield from check_data(document, platform)
    for prefix, part in _compiled_parts(document):
        for path, rule, value, fix in [*check_lists(part), *check_texts(part)]:
            yield f"{prefix}{path}", rule, value, fix
    if not _is_pipeline(document):
        yield from check_resource(document)
        for path, node in [("", document), *((path, node) for path, _, node, _ in _walk(document))]:
            if isinstance(node, dict) and isinstance(node.get("containers"), list):
                yield from check_pod(path, node)


def _is_pipeline(document: Any) -> bool:
    return isinstance(document, dict) and "pipelineInfo" in document


def _is_platform(document: Any) -> bool:
    return isinstance(document, dict) and "platforms" in document


def _compiled_parts(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what KFP compiles to a workflow, and its path in the document."""
    if _is_pipeline(document) or _is_platform(document):
        return [("", document)]
    if document["kind"] == "PipelineVersion":
        return [
            (f"spec.{part}.", mapping(document, "spec", part))
            for part in ("pipelineSpec", "platformSpec")
        ]
    return []


def _walk(
    node: Any, path: str = "", key: str = "", parent: Any = None
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield (path, nearest key, value, mapping or list that holds the value), depth first."""
    if path:
        yield path, key, node, parent
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _walk(value, f"{path}.{name}" if path else str(name), str(name), node)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}[{index}]", key, node)


def _check_value(path: str, key: str, value: Any, parent: Any) -> Problems:
    """Yield a problem if a value is forbidden; these rules apply to every kind of document."""
    if isinstance(value, str):
        yield from _secrets(path, key, value, parent)
    if key == "image" and isinstance(value, str) and isinstance(parent, dict):
        yield from _image(path, value)
    if key == "newTag" and value == "latest":
        yield path, "image-tag", "latest", "name a version"
    if key == "privileged" and value is True:
        yield path, "privileged", "true", "remove it; no step needs access to the node"
    if key == "allowPrivilegeEscalation" and value is True:
        yield path, "privilege-escalation", "true", "set it to false"
    if key == "hostPath" and isinstance(value, dict) and isinstance(value.get("path"), str):
        yield path, "host-path", value["path"], "use a PersistentVolumeClaim or an emptyDir"
    if key in ("hostNetwork", "hostPID", "hostIPC") and value is True:
        yield path, "host-namespace", "true", "remove it; pods have their own namespaces"
    if key == "runAsUser" and str(value) == "0":
        yield path, "root-user", "0", "set a number above 0, e.g. 65532"
    if key == "runAsNonRoot" and value is False:
        yield path, "root-user", "false", "set it to true"
    if key in ("command", "args") and isinstance(value, list):
        text = " ".join(str(part) for part in value)
        match = PIP_INSTALL.search(text)
        if match:
            command = _shorten(text[match.start() :])
            yield path, "pip-install", command, "build the package into the image"


def _secrets(path: str, key: str, value: str, parent: Any) -> Problems:
    fix = "remove it, revoke it, and refer to a Kubernetes secret by name"
    secrets = find_secrets(value)
    for kind, secret in secrets:
        yield path, "secret-value", f"{kind} {mask(secret)}", fix
    if secrets or not isinstance(parent, dict | list):
        return
    name = parent.get("name") if key == "value" and isinstance(parent, dict) else None
    if isinstance(name, str) and is_credential_name(name) and value and "$(" not in value:
        variable = f"{name} is {mask(value)}"
        yield path, "secret-value", variable, "use valueFrom.secretKeyRef instead of value"


def _image(path: str, image: str) -> Problems:
    # A placeholder that a pipeline fills in when it runs has no tag yet.
    if "{{" in image or "@sha256:" in image:
        return
    tag = image.rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest"):
        yield path, "image-tag", _shorten(image), "name a version or a digest (@sha256:...)"


def _shorten(text: str) -> str:
    text = " ".join(mask_within(text).split())
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."
