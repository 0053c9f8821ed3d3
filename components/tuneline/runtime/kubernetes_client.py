"""Connect to a Kubernetes API with the official Python client.

The credentials are those that kubectl uses (KUBECONFIG or ~/.kube/config), or, in a pod, those of
its service account.
"""

import os
from pathlib import Path
from typing import Any, cast

import urllib3
import yaml
from kubernetes import client, config

from tuneline.errors import UserError

NAMESPACE_VARIABLE = "NAMESPACE"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

AWAY = (429, 500, 502, 503, 504)
"""HTTP status codes of temporary failures, after which a request is worth repeating."""


def own_namespace() -> str | None:
    """Return the namespace of the pod that this process runs in; None outside a pod."""
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace is None and NAMESPACE_FILE.is_file():
        namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    return namespace or None


def connect(
    *, context: str | None = None, num_retries: int, backoff_seconds: float = 0.0
) -> client.ApiClient:
    """Return a client that has the user's or the pod's credentials and retries GET requests.

    Args:
        context: context of the kubeconfig; None: the current one.
        num_retries: maximum number of retries of a GET request.
        backoff_seconds: pause before the second retry; each further pause is twice as long.

    Raises:
        UserError: there are no credentials, or they cannot be read.
    """
    settings = client.Configuration()
    # Not left to the client, which reads KUBECONFIG only when it is imported, and prints.
    files = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if any(Path(file).exists() for file in files.split(os.pathsep)):
        try:
            config.load_kube_config(files, context=context, client_configuration=settings)
        except (config.ConfigException, OSError, ValueError, yaml.YAMLError) as error:
            message = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"the kubeconfig {files} cannot be used: {message}; `kubectl config get-contexts` "
                "lists its contexts"
            ) from None
    else:
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            raise UserError(
                f"no Kubernetes cluster: there is no {files}, and this is not a pod; set "
                "KUBECONFIG, or log in as for kubectl"
            ) from None
    # The client also accepts a urllib3.Retry, although `retries` is typed as a number.
    cast(Any, settings).retries = urllib3.Retry(
        total=num_retries,
        backoff_factor=backoff_seconds,
        status_forcelist=AWAY,
        allowed_methods=["GET"],
        raise_on_status=False,
    )
    return client.ApiClient(settings)


def true_conditions(body: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the conditions of an object whose status is True, by their type."""
    conditions = body.get("status", {}).get("conditions", [])
    return {each["type"]: each for each in conditions if each["status"] == "True"}
