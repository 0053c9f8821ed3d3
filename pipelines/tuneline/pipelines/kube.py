"""Ask a Kubernetes API, with the client that Kubernetes publishes; nothing is written.

A server that is away for a minute is asked again, for a minute.
"""

import contextlib
import socket
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import urllib3
from kubernetes import client

from tuneline.errors import ClusterError, CredentialsError
from tuneline.runtime.kubernetes_client import connect
from tuneline.train.trainjob.manifest import GROUP, PLURAL, VERSION

BACKOFF_SECONDS = 1.0
"""Six tries: 0, 2, 4, 8, 16 and 32 of it apart."""
LOG_LINES = 200


class Kube:
    """One cluster, one namespace."""

    def __init__(self, namespace: str, *, context: str | None = None) -> None:
        """Read the credentials.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        self.namespace = namespace
        self._api = connect(context=context, num_retries=6, backoff_seconds=BACKOFF_SECONDS)
        self.host = self._api.configuration.host
        self._core = client.CoreV1Api(self._api)
        self._custom = client.CustomObjectsApi(self._api)

    def answers(self, seconds: float) -> bool:
        """Say whether anybody takes a connection; the client would try for minutes."""
        address = urllib.parse.urlsplit(self.host)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), seconds).close()
        except OSError:
            return False
        return True

    def version(self) -> str:
        """Return the server's version, e.g. v1.32.4."""
        with self._plainly("its version"):
            return client.VersionApi(self._api).get_code().git_version

    def may(self, right: "Right", *, account: str | None = None) -> bool:
        """Say whether it is allowed in the namespace.

        Args:
            right: what.
            account: a service account of the namespace; None: these credentials.
        """
        attributes = client.V1ResourceAttributes(
            namespace=self.namespace,
            verb=right.verb,
            resource=right.resource,
            group=right.group,
            subresource=right.subresource,
        )
        reviews = client.AuthorizationV1Api(self._api)
        with self._plainly("access rules"):
            if account is None:
                own = client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
                review = reviews.create_self_subject_access_review(
                    client.V1SelfSubjectAccessReview(spec=own)
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
                # Of this namespace only, which its administrators may ask too.
                review = reviews.create_namespaced_local_subject_access_review(
                    self.namespace,
                    client.V1LocalSubjectAccessReview(
                        metadata=client.V1ObjectMeta(namespace=self.namespace), spec=spec
                    ),
                )
        return bool(review.status.allowed)

    def served_versions(self, crd: str) -> list[str] | None:
        """Return the served versions of a custom resource, e.g. trainjobs.trainer.kubeflow.org."""
        with self._plainly(f"customresourcedefinition {crd}"):
            try:
                found = client.ApiextensionsV1Api(self._api).read_custom_resource_definition(crd)
            except client.ApiException as error:
                if error.status == 404:
                    return None
                raise
        return [version.name for version in found.spec.versions if version.served]

    def secret_names(self) -> set[str]:
        """Return the names of the namespace's secrets, and nothing that is in them."""
        with self._plainly("secrets"):
            return {
                each.metadata.name
                for each in self._core.list_namespaced_secret(self.namespace).items
            }

    def claim(self, name: str) -> Any | None:
        """Return a PersistentVolumeClaim, or None."""
        with self._plainly(f"persistentvolumeclaim {name}"):
            return _found(self._core.read_namespaced_persistent_volume_claim, name, self.namespace)

    def local_queue(self, name: str) -> dict[str, Any] | None:
        """Return a Kueue LocalQueue, or None."""
        with self._plainly(f"localqueue {name}"):
            # Kueue before 0.14 knows the second only, one day the first only will be left.
            for version in ("v1beta2", "v1beta1"):
                found: dict[str, Any] | None = _found(
                    self._custom.get_namespaced_custom_object,
                    *("kueue.x-k8s.io", version, self.namespace, "localqueues", name),
                )
                if found is not None:
                    return found
        return None

    def quotas(self) -> list[Any]:
        """Return the namespace's resource quotas."""
        with self._plainly("resourcequotas"):
            return self._core.list_namespaced_resource_quota(self.namespace).items

    def nodes(self) -> list[Any]:
        """Return the cluster's nodes."""
        with self._plainly("nodes"):
            return self._core.list_node().items

    def pods(self, selector: str) -> list[Any]:
        """Return the pods that a label selector picks."""
        with self._plainly("pods"):
            return self._core.list_namespaced_pod(self.namespace, label_selector=selector).items

    def workflows(self, selector: str) -> list[dict[str, Any]]:
        """Return the Argo workflows that a label selector picks."""
        with self._plainly("workflows"):
            return self._custom.list_namespaced_custom_object(
                "argoproj.io", "v1alpha1", self.namespace, "workflows", label_selector=selector
            )["items"]

    def trainjobs(self, selector: str) -> list[dict[str, Any]]:
        """Return the TrainJobs that a label selector picks; none where Trainer is not installed."""
        with self._plainly("trainjobs"):
            try:
                return self._custom.list_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, label_selector=selector
                )["items"]
            except client.ApiException as error:
                if error.status == 404:
                    return []
                raise

    def events(self, pod: str) -> list[Any]:
        """Return what happened to a pod, the newest last."""
        with self._plainly("events"):
            return self._core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.name={pod}"
            ).items

    def log(self, pod: str, container: str) -> str:
        """Return the last lines of a container; what a pod that is gone wrote is gone too."""
        with self._plainly(f"the log of pod {pod}"):
            text = _found(
                self._core.read_namespaced_pod_log,
                pod,
                self.namespace,
                container=container,
                tail_lines=LOG_LINES,
            )
        return text or ""

    @contextlib.contextmanager
    def _plainly(self, what: str) -> Iterator[None]:
        try:
            yield
        except client.ApiException as error:
            if error.status in (401, 403):
                raise Refused(
                    f"Kubernetes at {self.host} refuses to show {what} in namespace "
                    f"{self.namespace} ({error.status}): log in again, or ask for the right"
                ) from None
            raise ClusterError(
                f"Kubernetes at {self.host} answered {error.status} when asked for {what}: "
                f"{' '.join(str(error.reason).split())}"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(
                f"Kubernetes cannot be reached at {self.host} ({type(error).__name__}): check the "
                "network and the cluster in your kubeconfig"
            ) from None


class Refused(CredentialsError):
    """These credentials may not see it."""


@dataclass(frozen=True)
class Right:
    """Something that the line, or one who watches it, has to be allowed."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""

    def __str__(self) -> str:
        """As kubectl auth can-i takes it."""
        name = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {name}{'.' if self.group else ''}{self.group}"


def _found(call: Any, *arguments: Any, **named: Any) -> Any | None:
    try:
        return call(*arguments, **named)
    except client.ApiException as error:
        if error.status == 404:
            return None
        raise
