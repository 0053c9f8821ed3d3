"""A KFP and a Kubernetes server for the tests of the commands that talk to them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import pytest
from kfp_server import KfpServer
from kube_server import KubeServer


@pytest.fixture
def kfp_server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The server, named in the environment; parametrize indirectly for its arguments."""
    arguments = getattr(request, "param", {})
    with KfpServer(**arguments) as server:
        monkeypatch.setenv("KFP_ENDPOINT", server.host)
        for name in ("KFP_TOKEN", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        # A session of the person who runs the tests has no part in them.
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
        yield server


@pytest.fixture
def kube_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The server, named by the kubeconfig in the environment."""
    with KubeServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        yield server
