"""Which kernels the patched models run."""

import pytest

from tuneline.kernels.ops import activation_lora


@pytest.fixture(autouse=True)
def references_unless_interpreted(request):
    """Let the ops run their references, but for tests that ask for `interpreted`.

    The kernels have tests of their own; here they show that the layer hands them what they want.
    """
    if "interpreted" not in request.fixturenames:
        request.getfixturevalue("references")


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernels; programs of few tokens leave little masked work to interpret."""
    monkeypatch.setattr(activation_lora, "_ROWS", 16)
