"""Connect to a Kubernetes API with the client that Kubernetes publishes.

Credentials are kubectl's: KUBECONFIG, ~/.kube/config, or a pod's own service account.
"""

import os
from pathlib import Path

import urllib3
from kubernetes import client, config

from tuneline.errors import UserError

AWAY = (429, 500, 502, 503, 504)
"""Answers of a server that may give another one a little later."""


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
    try:
        if any(Path(file).exists() for file in files.split(os.pathsep)):
            config.load_kube_config(files, context=context, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise UserError(
            f"no Kubernetes cluster: {error}; set KUBECONFIG, or log in as for kubectl"
        ) from None
    settings.retries = urllib3.Retry(
        total=num_retries,
        backoff_factor=backoff_seconds,
        status_forcelist=AWAY,
        allowed_methods=["GET"],
        raise_on_status=False,
    )
    return client.ApiClient(settings)
