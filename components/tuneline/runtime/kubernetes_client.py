"""Connect to a Kubernetes API with the client that Kubernetes publishes.

Credentials are kubectl's: KUBECONFIG, ~/.kube/config, or a pod's own service account.
"""

import os
from pathlib import Path

import urllib3
import yaml
from kubernetes import client, config

from tuneline.errors import UserError

NAMESPACE_VARIABLE = "NAMESPACE"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

AWAY = (429, 500, 502, 503, 504)
"""Answers of a server that may give another one a little later."""


def own_namespace() -> str | None:
    """Return the namespace of the pod that this runs in; None: this is no pod."""
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace is None and NAMESPACE_FILE.is_file():
        namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    return namespace or None


def connect(
    *, context: str | None = None, num_retries: int, backoff_seconds: float = 0.0
) -> client.ApiClient:
    """Read the credentials, and return a client that asks again where a server is away.

    Args:
        context: of the kubeconfig; None: the current one.
        num_retries: of a GET.
        backoff_seconds: before the second of them; twice as long before each that follows.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    settings = client.Configuration()
    # The client's own search reads KUBECONFIG when it is imported, and prints.
    files = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if any(Path(file).exists() for file in files.split(os.pathsep)):
        try:
            config.load_kube_config(files, context=context, client_configuration=settings)
        except (config.ConfigException, OSError, ValueError, yaml.YAMLError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"the kubeconfig {files} cannot be used: {said}; `kubectl config get-contexts` "
                "shows what is in it"
            ) from None
    else:
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            raise UserError(
                f"no Kubernetes cluster: there is no {files}, and this is no pod; set KUBECONFIG, "
                "or log in as for kubectl"
            ) from None
    settings.retries = urllib3.Retry(
        total=num_retries,
        backoff_factor=backoff_seconds,
        status_forcelist=AWAY,
        allowed_methods=["GET"],
        raise_on_status=False,
    )
    return client.ApiClient(settings)
