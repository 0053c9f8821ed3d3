"""Call a Kubernetes API with the official client, whose errors become sentences.

Requests to a server that is unreachable are repeated for about a minute.
"""

import contextlib
import json
import socket
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import urllib3
from kubernetes import client

from tuneline.errors import ClusterError, CredentialsError, UserError
from tuneline.pods import MANAGED_BY
from tuneline.runtime.kubernetes_client import connect

BACKOFF_SECONDS = 1.0
"""Unit of the pauses before the six retries, which are 0, 2, 4, 8, 16 and 32 units long."""

# Any, because the return types of the generated client are unions over all modes of a call.
apis = cast(Any, client)


class KubeApi:
    """The API of one cluster, for requests about one namespace."""

    def __init__(self, namespace: str, *, context: str | None = None) -> None:
        """Read the credentials of the kubeconfig, or of the pod.

        Raises:
            UserError: there are no credentials, or they cannot be read.
        """
        self.namespace = namespace
        self.api = connect(context=context, num_retries=6, backoff_seconds=BACKOFF_SECONDS)
        self.host = self.api.configuration.host
        self.core = apis.CoreV1Api(self.api)
        self.custom = apis.CustomObjectsApi(self.api)

    def answers(self, seconds: float) -> bool:
        """Return whether the server accepts a connection within `seconds`.

        A request of the Kubernetes client to an unreachable server would be retried for minutes.
        """
        address = urllib.parse.urlsplit(self.host)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), seconds).close()
        except OSError:
            return False
        return True

    def write(self, group: str, version: str, plural: str, body: dict[str, Any]) -> str:
        """Create a custom object, or replace one that tuneline wrote; return which of them.

        Args:
            group: API group of its kind.
            version: API version of its kind.
            plural: plural name of its kind.
            body: the object.

        Raises:
            UserError: the kind is not installed, or somebody else wrote an object of that name.
            ClusterError: the server cannot be reached, or refuses the object.
        """
        name = body["metadata"]["name"]
        what, where = f"{body['kind']} {name}", (group, version, self.namespace, plural)
        with self.explained(what):
            present = or_none(self.custom.get_namespaced_custom_object, *where, name)
        if present is not None:
            labels = present["metadata"].get("labels") or {}
            if labels.get(MANAGED_BY[0]) != MANAGED_BY[1]:
                raise UserError(
                    f"the namespace {self.namespace} has the {what} already, which tuneline did "
                    "not write, so it stays as it is: delete it, or choose another namespace"
                )
            version_seen = present["metadata"]["resourceVersion"]
            metadata = {**body["metadata"], "resourceVersion": version_seen}
            with self.explained(what, verb="write"):
                self.custom.replace_namespaced_custom_object(
                    *where, name, {**body, "metadata": metadata}
                )
            return "replaced"
        with self.explained(what, verb="write"):
            try:
                self.custom.create_namespaced_custom_object(*where, body)
            except client.ApiException as error:
                if error.status != 404:
                    raise
                raise UserError(
                    f"the cluster at {self.host} has no {plural}.{group}, or no namespace "
                    f"{self.namespace}: install what serves them, or name another namespace"
                ) from None
        return "created"

    @contextlib.contextmanager
    def explained(
        self, what: str, namespace: str | None = None, *, verb: str = "show"
    ) -> Iterator[None]:
        """Translate the client's exceptions into sentences about a request for `what`.

        Args:
            what: what is requested, in a few words.
            namespace: namespace of the request; None: that of this object.
            verb: what the server is asked to do with it.
        """
        asked = f"for {what}" if verb == "show" else f"to {verb} {what}"
        try:
            yield
        except client.ApiException as error:
            if error.status in (401, 403):
                raise Refused(
                    f"Kubernetes at {self.host} refuses to {verb} {what} in namespace "
                    f"{namespace or self.namespace} ({error.status}): log in again, or request "
                    "the permission"
                ) from None
            raise ClusterError(
                f"Kubernetes at {self.host} answered {error.status} when asked {asked}: "
                f"{_message(error)}"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(
                f"Kubernetes cannot be reached at {self.host} ({type(error).__name__}): check the "
                "network and the cluster in your kubeconfig"
            ) from None


def _message(error: client.ApiException) -> str:
    """Return what the server says of an error, in one line."""
    text = str(error.reason)
    with contextlib.suppress(ValueError, TypeError):
        status = json.loads(error.body)
        text = status["message"] if isinstance(status, dict) and "message" in status else text
    return " ".join(text.split())


class Refused(CredentialsError):
    """The credentials are not allowed to see the object."""


@dataclass(frozen=True)
class Right:
    """A right on a Kubernetes resource that a run, or a person who watches the run, needs."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""

    def __str__(self) -> str:
        """Return the right in the form of the arguments of `kubectl auth can-i`."""
        name = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {name}{'.' if self.group else ''}{self.group}"


def items(call: Any, *arguments: Any, **named: Any) -> list[dict[str, Any]]:
    """Return the items of a list as JSON; the client's own types lack fields that it ignores."""
    response = call(*arguments, **named, _preload_content=False)
    items: list[dict[str, Any]] = json.loads(response.data)["items"]
    return items


def or_none(call: Any, *arguments: Any, **named: Any) -> Any | None:
    """Return the result of a call; None if the object does not exist."""
    try:
        return call(*arguments, **named)
    except client.ApiException as error:
        if error.status == 404:
            return None
        raise
