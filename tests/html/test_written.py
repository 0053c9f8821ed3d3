"""A page that cannot be drawn or written does not lose what it describes."""

from pathlib import Path

import pytest

from tuneline.html.written import write_page


def test_a_page_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_page(tmp_path / "new" / "page.html", lambda: "<p>curves</p>", title="Training")
    assert (tmp_path / "new" / "page.html").read_text() == "<p>curves</p>"
    assert caplog.text == ""


def test_a_page_that_cannot_be_drawn_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def draw() -> str:
        raise ZeroDivisionError("no <steps>\nmore")

    write_page(tmp_path / "page.html", draw, title="Training")
    text = (tmp_path / "page.html").read_text()
    assert "<h1>Training</h1>" in text
    assert "could not be drawn (ZeroDivisionError: no &lt;steps&gt;)." in text
    assert "ZeroDivisionError: no <steps>); the result itself is kept" in caplog.text


def test_a_page_that_cannot_be_written_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    write_page(tmp_path / "file" / "page.html", lambda: "<p>", title="Training")
    assert f"the page {tmp_path}/file/page.html could not be written" in caplog.text
