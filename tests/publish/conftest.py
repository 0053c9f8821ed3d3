import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def load_hub_server() -> ModuleType:
    # tests are not packages, so the module beside this one is loaded by its path.
    spec = importlib.util.spec_from_file_location(
        "hub_server", Path(__file__).parent / "hub_server.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hub_server() -> ModuleType:
    return load_hub_server()


@pytest.fixture
def hub(hub_server: ModuleType) -> Iterator:
    server = hub_server.Hub()
    yield server
    server.close()
