from collections.abc import Iterator

import hub_server
import pytest


@pytest.fixture
def hub() -> Iterator:
    server = hub_server.Hub()
    yield server
    server.close()
