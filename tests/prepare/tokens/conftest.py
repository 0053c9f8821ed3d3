"""What the tests of templates share: a tokenizer with the markers of all model families."""

from typing import Any

import pytest
from template_families import TEMPLATES, with_markers


@pytest.fixture(scope="session")
def marked(tokenizer: Any) -> Any:
    """A tokenizer with the markers of all families; a test sets its template."""
    return with_markers(
        tokenizer, [path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))]
    )
