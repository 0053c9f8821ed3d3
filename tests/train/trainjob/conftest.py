"""A Kubernetes API for the tests of TrainJobs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kube_server import KubeServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with KubeServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        yield server
