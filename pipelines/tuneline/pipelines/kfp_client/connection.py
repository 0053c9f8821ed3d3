"""Connect to the API of Kubeflow Pipelines, through kfp.Client.

Authentication is kfp's own: a session cookie in ~/.config/kfp/context.json, the token that a
cluster projects into its pods, or a token in the environment variable KFP_TOKEN. A token is never
an argument, which other users could read in the process list.
"""

import contextlib
import io
import json
import os
import re
import socket
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import kfp
import kfp_server_api
import urllib3
from kfp.client import set_volume_credentials

from tuneline.errors import ClusterError, CredentialsError, UserError

HOST_VARIABLE = "KFP_ENDPOINT"
TOKEN_VARIABLE = "KFP_TOKEN"
KFP_HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"
"""Environment variable from which kfp also reads the host."""

POD_TOKEN_PATH = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
PROJECTED_TOKEN_PATH = Path("/var/run/secrets/kubeflow/pipelines/token")

CONNECT_SECONDS = 10
"""Time limit for opening a connection to the host."""

# Servers newer than 2.17 have only the first path, 2.17 has only the second.
LOG_PATHS = (
    "/apis/v2beta1/runs/{run_id}/nodes/{pod}/log",
    "/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log",
)


# Any, because kfp.Client declares its optional arguments without None and its results as unions.
_KfpClient: Any = cast(Any, kfp.Client)


class Client(_KfpClient):  # type: ignore[misc, unused-ignore]  # kfp has no types
    """A kfp.Client that checks the server's health once; kfp's own repeats that for 25 seconds."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Return the server's health record, or raise the first error."""
        health = self._healthz_api.healthz_service_get_healthz()
        if health.multi_user is None:
            # A login page also answers with status 200.
            raise CredentialsError(
                "the answer is not from Kubeflow Pipelines, perhaps a login page: check that the "
                f"host is that of the API, and log in or set {TOKEN_VARIABLE}"
            )
        return health

    def read_log(self, run_id: str, pod: str) -> str | None:
        """Return the log of a pod's main container; None if the server has none.

        kfp.Client has no method for it. A server of one user (KFP 2.17) looks for running pods in
        no namespace, so that it finds only logs that Argo has archived.
        """
        for path in LOG_PATHS:
            try:
                response = self._run_api.api_client.call_api(
                    path,
                    "GET",
                    path_params={"run_id": run_id, "pod": pod},
                    auth_settings=["Bearer"],
                    _preload_content=False,
                    _return_http_data_only=True,
                )
            except kfp_server_api.ApiException as error:
                if error.status != 404 or path == LOG_PATHS[-1]:
                    raise
            else:
                text = str(response.data, "utf-8", "replace")
                # KFP 2.17 sends its error as the log, with status 200.
                return None if text.startswith('{"error_message":') else text
        raise AssertionError("the last path returns or raises")

    def resume_run(self, run_id: str) -> None:
        """Ask the server to retry the failed tasks of a run; kfp.Client has no method for it."""
        self._run_api.run_service_retry_run(run_id)


def connect(host: str | None) -> Client:
    """Connect to the KFP API at `host`; None: the environment tells the host.

    Raises:
        UserError: no host is given, and none can be found.
        CredentialsError: the server does not accept the credentials.
        ClusterError: the server is unreachable.
    """
    host = known_host(host)
    kube_config = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    if not host and not POD_TOKEN_PATH.exists() and not kube_config.exists():
        raise UserError(
            f"no host: give --host URL or set {HOST_VARIABLE}, e.g. http://localhost:8080 after "
            "`kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
        )
    if host:
        host = host if host.startswith("http") else f"https://{host}"
        _probe(host)
    projected = PROJECTED_TOKEN_PATH.exists() or "KF_PIPELINES_SA_TOKEN_PATH" in os.environ
    credentials = set_volume_credentials.ServiceAccountTokenVolumeCredentials()
    with readable_errors(), warnings.catch_warnings():
        # kfp warns that it does not support servers before 2.0.
        warnings.simplefilter("ignore", FutureWarning)
        return Client(
            host=host,
            existing_token=os.environ.get(TOKEN_VARIABLE),
            credentials=credentials if projected else None,
        )


def known_host(host: str | None) -> str | None:
    """Return the host that was given or that the environment names; None if there is none."""
    return host or os.environ.get(HOST_VARIABLE) or os.environ.get(KFP_HOST_VARIABLE)


def _probe(host: str) -> None:
    """Try to open a connection once; kfp.Client would retry an unreachable host for minutes."""
    address = urllib.parse.urlsplit(host)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _unreachable(host, str(error)) from None


def _unreachable(host: str, reason: str) -> ClusterError:
    return ClusterError(
        f"Kubeflow Pipelines cannot be reached at {host} ({reason}): check --host or "
        f"{HOST_VARIABLE}, the network, and a port-forward that may have ended"
    )


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Translate kfp's exceptions into tuneline's errors, and suppress what kfp prints.

    Raises:
        CredentialsError: the server answered 401 or 403.
        ClusterError: the server answered with another error, or is unreachable.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        raise _explain(error) from None
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        address = getattr(getattr(error, "pool", None), "host", "the host")
        text = re.sub(r"^<.*?>: |^\w+\(.*?\): ", "", str(reason))
        raise _unreachable(address, text) from None


def _explain(error: kfp_server_api.ApiException) -> Exception:
    message = message_of(error)
    if error.status == 401:
        return CredentialsError(
            f"Kubeflow Pipelines cannot identify you (401: {message}): log in again, or set "
            f"{TOKEN_VARIABLE} to a token that has not expired"
        )
    if error.status == 403:
        return CredentialsError(
            f"Kubeflow Pipelines denies this request (403: {message}): name one of your namespaces "
            "with --namespace, or ask the owner of the namespace for permission"
        )
    return ClusterError(f"Kubeflow Pipelines answered {error.status}: {message}")


def message_of(error: kfp_server_api.ApiException) -> str:
    """Return the server's message on one line of at most 300 characters."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body
    try:
        fields = json.loads(body or "")
        message = fields.get("message") or fields.get("error_message") or fields.get("error")
    except (ValueError, AttributeError):
        message = None
    return " ".join(str(message or error.reason or "no reason given").split())[:300]
