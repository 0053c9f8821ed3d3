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

from tuneline.errors import ClusterError, CredentialsError
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

    @contextlib.contextmanager
    def explained(self, what: str, namespace: str | None = None) -> Iterator[None]:
        """Translate the client's exceptions into sentences about a request for `what`.

        Args:
            what: what is requested, in a few words.
            namespace: namespace of the request; None: that of this object.
        """
        try:
            yield
        except client.ApiException as error:
            if error.status in (401, 403):
                raise Refused(
                    f"Kubernetes at {self.host} refuses to show {what} in namespace "
                    f"{namespace or self.namespace} ({error.status}): log in again, or request "
                    "the permission"
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
