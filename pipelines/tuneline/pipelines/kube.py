"""Read from a Kubernetes API; nothing is written."""

import contextlib
from collections.abc import Iterator
from typing import Any

from kubernetes import client

from tuneline.pipelines.kube_api import KubeApi, Right, apis, items, or_none
from tuneline.train.trainjob.manifest import GROUP, PLURAL, VERSION

CONTROLLER_SETTINGS = "workflow-controller-configmap"
CONTROLLER_NAMESPACE = "kubeflow"
LOG_LINES = 200
"""Lines at the end of a container's log that are read."""


class Kube(KubeApi):
    """One namespace of one cluster."""

    def version(self) -> str:
        """Return the server's version, e.g. v1.32.4."""
        with self.explained("its version"):
            version: str = apis.VersionApi(self.api).get_code().git_version
        return version

    def may(self, right: Right, *, account: str | None = None) -> bool:
        """Return whether a right is granted in the namespace.

        Args:
            right: the right.
            account: a service account of the namespace; None: the credentials in use.
        """
        attributes = client.V1ResourceAttributes(
            namespace=self.namespace,
            verb=right.verb,
            resource=right.resource,
            group=right.group,
            subresource=right.subresource,
        )
        reviews = apis.AuthorizationV1Api(self.api)
        with self.explained("access rules"):
            if account is None:
                review = reviews.create_self_subject_access_review(
                    client.V1SelfSubjectAccessReview(
                        spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
                    )
                )
            else:
                spec = client.V1SubjectAccessReviewSpec(
                    resource_attributes=attributes,
                    user=f"system:serviceaccount:{self.namespace}:{account}",
                    groups=[
                        "system:serviceaccounts",
                        f"system:serviceaccounts:{self.namespace}",
                        "system:authenticated",
                    ],
                )
                # A local review needs no rights outside the namespace.
                review = reviews.create_namespaced_local_subject_access_review(
                    self.namespace,
                    client.V1LocalSubjectAccessReview(
                        metadata=client.V1ObjectMeta(namespace=self.namespace), spec=spec
                    ),
                )
        return bool(review.status.allowed)

    def served_versions(self, crd: str) -> list[str] | None:
        """Return the served versions of a custom resource; None if it is not installed.

        Args:
            crd: full name, e.g. trainjobs.trainer.kubeflow.org.
        """
        with self.explained(f"customresourcedefinition {crd}"):
            try:
                definition = apis.ApiextensionsV1Api(self.api).read_custom_resource_definition(crd)
            except client.ApiException as error:
                if error.status == 404:
                    return None
                raise
        return [version.name for version in definition.spec.versions if version.served]

    def secret_names(self) -> set[str]:
        """Return the names of the namespace's secrets; the contents are discarded."""
        with self.explained("secrets"):
            return {
                secret.metadata.name
                for secret in self.core.list_namespaced_secret(self.namespace).items
            }

    def config_map_keys(self, name: str) -> set[str] | None:
        """Return the keys of a ConfigMap; None if it does not exist."""
        with self.explained(f"configmap {name}"):
            found = or_none(self.core.read_namespaced_config_map, name, self.namespace)
        if found is None:
            return None
        return {*(found.data or {}), *(found.binary_data or {})}

    def claim(self, name: str) -> Any | None:
        """Return a PersistentVolumeClaim; None if it does not exist."""
        with self.explained(f"persistentvolumeclaim {name}"):
            return or_none(self.core.read_namespaced_persistent_volume_claim, name, self.namespace)

    def local_queue(self, name: str) -> dict[str, Any] | None:
        """Return a Kueue LocalQueue; None if it does not exist."""
        with self.explained(f"localqueue {name}"):
            # Kueue before 0.14 serves only v1beta1, which later versions will no longer serve.
            for version in ("v1beta2", "v1beta1"):
                queue: dict[str, Any] | None = or_none(
                    self.custom.get_namespaced_custom_object,
                    *("kueue.x-k8s.io", version, self.namespace, "localqueues", name),
                )
                if queue is not None:
                    return queue
        return None

    def controller_settings(self) -> dict[str, str] | None:
        """Return the settings of Argo's workflow controller; None if there is no ConfigMap.

        The controller runs in the namespace itself, or in that of Kubeflow.
        """
        for namespace in dict.fromkeys((self.namespace, CONTROLLER_NAMESPACE)):
            with self.explained(f"configmap {CONTROLLER_SETTINGS}", namespace):
                found = or_none(
                    self.core.read_namespaced_config_map, CONTROLLER_SETTINGS, namespace
                )
            if found is not None:
                return dict(found.data or {})
        return None

    def quotas(self) -> list[Any]:
        """Return the namespace's resource quotas."""
        with self.explained("resourcequotas"):
            quotas: list[Any] = self.core.list_namespaced_resource_quota(self.namespace).items
        return quotas

    def limit_ranges(self) -> list[Any]:
        """Return the namespace's limit ranges."""
        with self.explained("limitranges"):
            found: list[Any] = self.core.list_namespaced_limit_range(self.namespace).items
        return found

    def nodes(self) -> list[Any]:
        """Return the cluster's nodes."""
        with self.explained("nodes"):
            nodes: list[Any] = self.core.list_node().items
        return nodes

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """Return the pods that a label selector matches, as the API writes them."""
        with self.explained("pods"):
            return items(self.core.list_namespaced_pod, self.namespace, label_selector=selector)

    def workflows(self, selector: str) -> list[dict[str, Any]]:
        """Return the Argo workflows that a label selector matches."""
        with self.explained("workflows"):
            workflows: list[dict[str, Any]] = self.custom.list_namespaced_custom_object(
                "argoproj.io", "v1alpha1", self.namespace, "workflows", label_selector=selector
            )["items"]
        return workflows

    def trainjobs(self, selector: str) -> list[dict[str, Any]]:
        """Return the TrainJobs that a label selector matches; none if Trainer is not installed."""
        with self.explained("trainjobs"):
            try:
                jobs: list[dict[str, Any]] = self.custom.list_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, label_selector=selector
                )["items"]
                return jobs
            except client.ApiException as error:
                if error.status == 404:
                    return []
                raise

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events about the object of a name, e.g. a pod, the newest last."""
        with self.explained("events"):
            events = items(
                self.core.list_namespaced_event,
                self.namespace,
                field_selector=f"involvedObject.name={name}",
            )
        return sorted(events, key=lambda event: event.get("lastTimestamp") or "")

    def log(self, pod: str, container: str, *, lines: int | None = LOG_LINES) -> str | None:
        """Return the end of a container's log; None if the pod no longer exists or has no log.

        Args:
            pod: name of the pod.
            container: name of the container.
            lines: number of lines at the end; None: the whole log.
        """
        with self.explained(f"the log of pod {pod}"):
            try:
                text: str = self.core.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    container=container,
                    **({} if lines is None else {"tail_lines": lines}),
                )
            except client.ApiException as error:
                # 400: the container has not started.
                if error.status in (400, 404):
                    return None
                raise
        return text

    def follow(self, pod: str, container: str) -> Iterator[str]:
        """Yield the lines of a container's log as they are written, until the container ends."""
        with self.explained(f"the log of pod {pod}"):
            response = self.core.read_namespaced_pod_log(
                pod, self.namespace, container=container, follow=True, _preload_content=False
            )
            with contextlib.closing(response):
                rest = b""
                for part in response.stream(None):
                    *lines, rest = (rest + part).split(b"\n")
                    for line in lines:
                        yield line.decode("utf-8", "replace")
                if rest:
                    yield rest.decode("utf-8", "replace")
