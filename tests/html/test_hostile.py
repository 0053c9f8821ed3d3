"""Text of data, models and names is text on every page. The report has its test in tests/report."""

from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small_records import new_training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuneline.artifacts import DatasetManifest, RunSummary, Scores, TrainingPoint
from tuneline.html.page import render_page
from tuneline.pipelines.compare.differences import ScoreDifference
from tuneline.pipelines.compare.finished import FinishedRun
from tuneline.pipelines.compare.page import render_comparison
from tuneline.prepare import statistics_page
from tuneline.prepare.tokens.tokenise import TokenRow
from tuneline.report.failed import render_failed
from tuneline.train.observe import page as training_page
from tuneline.train.observe.samples import Sample

EVIL = "<img src=x onerror=alert(1)>\"'</pre></section></svg><script>\u202e\x1b[2J\ud83d&#60;b>"
SHOWN = EVIL.replace("\u202e", r"\u202e").replace("\x1b", r"\x1b").replace("\ud83d", r"\ud83d")


class Elements(HTMLParser):
    """Collects the names of a page's elements and attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> None:
    """Check that the page has EVIL as text, and nothing that EVIL could have added."""
    page.encode("utf-8")
    found = Elements(page)
    assert SHOWN in found.text
    assert found.tags.isdisjoint({"img", "script", "b>"}) and "onerror" not in found.attributes
    assert not any(mark in unescape(page) for mark in "\u202e\x1b\ud83d")


def bytes_tokenizer() -> Any:
    """A tokenizer with one token per byte."""
    alphabet = {mark: number for number, mark in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_page_of_a_dataset(new_dataset: Callable[..., DatasetManifest]) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer(EVIL.replace("\ud83d", ""))["input_ids"]
    manifest = new_dataset(source=EVIL, template=EVIL, unused={EVIL: 3})
    sample = TokenRow(input_ids=ids, loss_mask=[0] * 4 + [1] * (len(ids) - 4))
    rejected = [{"source": EVIL, "line": 1, "reason": EVIL, "row": EVIL}]
    page = statistics_page.render(manifest, tokenizer, [sample], rejected)
    check(page)
    assert Elements(page).text.count("<img src=x onerror") == 7


def test_the_page_of_training() -> None:
    history = [TrainingPoint(step=step, loss=2.0 / step) for step in (1, 2, 3)]
    sample = Sample(prompt=EVIL, reference=EVIL, before=EVIL, after=EVIL)
    check(training_page.render(new_training(history=history, device=EVIL), [], [sample]))


def test_the_page_of_a_run_that_failed() -> None:
    failure = {"kind": EVIL, "message": EVIL, "seconds": 1.0}
    events = [{"step": "train", "event": what, "time": 0.0} for what in ("started", "failed")]
    check(render_failed(EVIL, [events[0], events[1] | failure]))


def test_the_page_of_a_comparison(new_dataset: Callable[..., DatasetManifest]) -> None:
    history = [TrainingPoint(step=step, loss=2.0 / step) for step in (1, 2, 3)]
    summary = RunSummary(recipe=EVIL, verdict="hold", reason=EVIL, comparisons=[], exports=[])
    runs = [
        FinishedRun(
            name=f"{EVIL}{number}",
            recipe={"description": f"{EVIL}{number}", EVIL: number},
            summary=summary,
            scores=Scores.model_construct(),
            training=new_training(history=history),
            dataset=new_dataset(source=EVIL),
            samples={},
        )
        for number in (1, 2)
    ]
    difference = ScoreDifference(
        task=EVIL,
        metric=EVIL,
        first=0.0,
        second=0.0,
        difference=0.0,
        interval=(0.0, 0.0),
        higher_is_better=True,
        num_common=1,
        num_samples=(1, 1),
    )
    check(render_comparison(runs, [([difference], EVIL)]))


@pytest.mark.parametrize("place", ["title", "subtitle"])
def test_the_head_of_a_page(place: str, tmp_path: Path) -> None:
    texts = {"title": "t", "subtitle": "s", place: EVIL}
    check(render_page(texts["title"], [], texts["subtitle"]))
