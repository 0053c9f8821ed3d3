"""The page of a run that failed names the step, the sentence and what to try."""

import re
from html import unescape

from tuneline.report.failed import render_failed


def event(step: str, what: str, **values) -> dict:
    return {"step": step, "event": what, "time": 0.0, **values}


def finished(step: str, seconds: float) -> list[dict]:
    return [event(step, "started"), event(step, "finished", seconds=seconds)]


def statuses(page: str) -> dict[str, tuple[str, str]]:
    """Return step -> (status, time) of the wide picture."""
    wide = re.search(r'<svg class="across".*?</svg>', page, re.S).group()
    return {
        name: (status, seconds)
        for status, name, seconds in re.findall(
            r'<g class="stage ([\w-]+)".*?class="step"[^>]*>([^<]+)<.*?class="time"[^>]*>([^<]+)<',
            wide,
        )
    }


def test_a_known_error_is_said_in_its_own_words() -> None:
    page = render_failed(
        "demo",
        [
            *finished("fetch", 11.4),
            *finished("prepare", 4.2),
            event("evaluate", "started", part="base"),
            event("evaluate", "progress", part="base", done=0, total=1, note="heldout_choice"),
            event("evaluate", "finished", part="base", seconds=20.0),
            event("train", "started"),
            event("train", "progress", done=23, total=60, note="loss nan"),
            event(
                "train",
                "failed",
                seconds=48.3,
                kind="TrainingError",
                message="the loss became nan at step 23: lower train.learning_rate (<2e-2>)",
            ),
            *finished("diagnose", 0.1),
        ],
    )
    shown = unescape(page)
    assert "Failed at train" in shown
    assert "the loss became nan at step 23: lower train.learning_rate (<2e-2>)" in shown
    assert "(&lt;2e-2&gt;)" in page
    assert "finished steps are taken from the cache" in shown
    assert "python -m tuneline.train --help" in shown
    assert statuses(page) == {
        "fetch": ("finished", "11 s"),
        "prepare": ("finished", "4.2 s"),
        "train": ("failed", "48 s"),
        "merge": ("not-run", "not run"),
        "evaluate tuned": ("not-run", "not run"),
        "gate": ("not-run", "not run"),
        "publish": ("not-run", "not run"),
        "evaluate base": ("finished", "20 s"),
        "quantize": ("not-run", "not run"),
    }


def test_a_step_that_was_killed() -> None:
    page = render_failed("demo", [*finished("fetch", 1.0), event("train", "started")])
    assert "Failed at train" in page and "it was killed, most often because memory ran out" in page
    assert statuses(page)["train"] == ("failed", "failed")


def test_one_of_two_formats_failed() -> None:
    page = render_failed(
        "demo",
        [
            *finished("convert-gguf", 30),
            event("quantize-gguf", "started", part="q8_0"),
            event("quantize-gguf", "started", part="q4_k_m"),
            event("quantize-gguf", "finished", part="q4_k_m", seconds=3),
            event(
                *("quantize-gguf", "failed"),
                **{"part": "q8_0", "seconds": 2, "kind": "OSError", "message": "[Errno 13] no"},
            ),
        ],
    )
    assert "Failed at quantize-gguf q8_0" in page
    assert statuses(page)["quantize"] == ("failed", "35 s")
    assert "Make the volume writable" in page
    assert "python -m tuneline.quantize --help" in page


def test_nothing_started() -> None:
    page = render_failed("demo", [])
    assert "Failed before the first step" in page
    assert {status for status, _ in statuses(page).values()} == {"not-run"}


def test_all_finished_but_no_report() -> None:
    page = render_failed("demo", finished("fetch", 1.0))
    assert "The run ended without a report" in page and "Failed at" not in page
