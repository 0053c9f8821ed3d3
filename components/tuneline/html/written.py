"""Write a page about a result that is finished: no error in the page may lose the result."""

import logging
from collections.abc import Callable
from pathlib import Path

from tuneline.html.page import paragraph, render_page, section

logger = logging.getLogger(__name__)


def write_page(path: Path, draw: Callable[[], str], *, title: str) -> None:
    """Write the page that `draw` returns; if drawing fails, log why and write a page that says so.

    Args:
        path: the file to write.
        draw: returns the page's HTML.
        title: title of the page that is written instead.
    """
    try:
        text = draw()
    # Whatever it is: what the page describes is finished, and does not depend on the page.
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        logger.warning(
            "the page %s could not be drawn (%s); the result itself is kept", path, reason
        )
        note = f"This page could not be drawn ({reason}). The result itself is not affected."
        text = render_page(title, [section("No figures", paragraph(note))])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning("the page %s could not be written (%s); the result is kept", path, error)
