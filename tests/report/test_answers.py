"""The sentences of the page: what was gained, whether it is safe, and what to change."""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from small_records import new_comparison, new_training

from tuneline.artifacts import (
    Decision,
    Published,
    PublishedRepo,
    RunHeader,
    TrainingPoint,
    write_jsonl,
)
from tuneline.html.units import number_pair
from tuneline.recipe import Recipe
from tuneline.records.in_words import gain, verdict_sentence
from tuneline.report.hold import causes
from tuneline.report.records import Line, Place
from tuneline.report.run import read_line, render

ON_CLUSTER = Place(run_name="demo-1")
BINARY = {"num_changed": 90, "num_samples": 200, "num_clusters": 200}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"base": 0.26, "tuned": 0.64, "difference": 0.38, "lower": 0.299, **BINARY},
            "Right answers rose from 26 % to 64 % on 200 unseen questions, at least +29 points "
            "with 95 % certainty.",
        ),
        (
            {"base": 0.5, "tuned": 0.5125, "difference": 0.0125, "interval": (-0.02, 0.045)}
            | {"lower": -0.014, "outcome": "undecided", **BINARY},
            "Right answers rose from 50.0 % to 51.2 % on 200 unseen questions, but with 95 % "
            "certainty the true change is only known to be between -2.0 and +4.5 points: no gain "
            "is proven.",
        ),
        (
            {"base": 0.64, "tuned": 0.4, "difference": -0.24, "interval": (-0.31, -0.169)}
            | {"outcome": "worse", "task": "boolq", "num_clusters": 150}
            | {"num_changed": 90, "num_samples": 200},
            "Right answers fell from 64 % to 40 % on 200 questions of boolq (150 different "
            "ones), a loss of at least 16 points with 95 % certainty.",
        ),
        (
            {"metric": "log_perplexity", "higher_is_better": False, "base": 2.3, "tuned": 1.1}
            | {"difference": 1.2, "interval": (0.9, 1.5), "lower": 0.95},
            "log_perplexity fell from 2.30 to 1.10 on 200 unseen questions, by at least 0.95 with "
            "95 % certainty.",
        ),
    ],
)
def test_a_gain_in_words(values: dict[str, Any], sentence: str) -> None:
    assert gain(new_comparison(**values)) == sentence


def test_a_hold_in_spite_of_a_gain_names_the_reason() -> None:
    target, guard = new_comparison(**BINARY), new_comparison(role="guard", outcome="worse")
    text = verdict_sentence("hold", "boolq -0.1 acc: a task got worse", [target, guard])
    assert text.startswith("Right answers rose from 25 % to 75 %")
    assert text.endswith("the gate holds the model back: boolq -0.1 acc: a task got worse.")
    assert "holds the model" not in verdict_sentence("promote", "all well", [target, guard])


@pytest.fixture
def line(recipe: Recipe, run_dirs: dict) -> Callable[..., Line]:
    """Return a function that reads the run, with some of its records replaced."""

    def read(place: Place = ON_CLUSTER, **records: Any) -> Line:
        inputs = {k: v for k, v in run_dirs.items() if k not in ("page_path", "summary_dir")}
        header = RunHeader.parse(recipe.model_dump_json())
        found = read_line(header, place=place, target=None, publish_config=None, **inputs)
        values = found.__dict__ | records
        return Line(**values)

    return read


def held(*comparisons: Any) -> Decision:
    return Decision(verdict="hold", reason="no gain", comparisons=list(comparisons))


UNDECIDED = {"difference": 0.05, "interval": (-0.02, 0.12), "lower": -0.009, "outcome": "undecided"}


def curve(*losses: float) -> list[TrainingPoint]:
    return [TrainingPoint(step=10 * n, eval_loss=loss) for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "cause", "setting"),
    [
        ((2.0, 1.5, 1.2), "Too few steps", "train.max_steps=40"),
        ((2.0, 1.0, 1.3), "Overfitting", "train.max_steps=10"),
        ((2.0, 2.4, 2.5), "Training did not help", "train.learning_rate=4e-05"),
        ((2.0, 1.0, 1.0), None, None),
    ],
)
def test_the_curve_tells_the_cause_of_a_hold(
    line: Callable[..., Line], losses: tuple, cause: str | None, setting: str | None
) -> None:
    training = new_training(
        history=curve(*losses),
        first_eval_loss=losses[0],
        final_eval_loss=min(losses),
        learning_rate=2e-4,
        num_steps=20,
        base_quantization="none",
    )
    target = new_comparison(**UNDECIDED | {"difference": -0.001})
    found = list(causes(line(decision=held(target), training=training)))
    assert [each.name for each in found] == ([cause] if cause else [])
    assert not cause or setting in found[0].settings


def test_rounding_forgetting_and_few_questions_are_causes(line: Callable[..., Line]) -> None:
    target = new_comparison(**UNDECIDED, **BINARY)
    guard = new_comparison(task="boolq", role="guard", difference=-0.1, outcome="worse", **BINARY)
    found = {each.name: each for each in causes(line(decision=held(target, guard)))}
    assert list(found)[:2] == ["Too few questions", "The model forgets what it could do"]
    # (2.927 * (0.05 + 0.009) / 1.645 / 0.05)^2 * 200 = 881, rounded up to 50.
    assert found["Too few questions"].settings == ("prepare.heldout.max_rows=900",)
    assert "boolq -10 points" in found["The model forgets what it could do"].evidence
    assert found["4-bit rounding"].settings == ("train.load_in_4bit=false",)


def test_a_gain_below_min_gain_has_the_causes_of_a_missing_gain(line: Callable[..., Line]) -> None:
    small = new_comparison(difference=0.1, interval=(0.04, 0.16), lower=0.05, **BINARY)
    decision = held(small).model_copy(update={"settings": {"min_gain": 0.5}})
    training = new_training(history=curve(2.0, 1.5, 1.2), num_steps=20, base_quantization="none")
    found = [each.name for each in causes(line(decision=decision, training=training))]
    assert found == ["Too few steps"]


def test_a_held_run_says_what_to_change_with_a_command_that_resumes_it(
    line: Callable[..., Line],
) -> None:
    decision = held(new_comparison(**UNDECIDED, **BINARY))
    place = Place(run_name="demo-1", is_local=True, working_dir="/home/someone/project")
    page = unescape(render(line(place, decision=decision)))
    assert "tuneline resume demo-1 <span>--set</span> prepare.heldout.max_rows=900" in page
    assert "tuneline chat demo-1" in page and "/home/someone/project" in page
    on_cluster = unescape(render(line(decision=decision)))
    assert "tuneline submit RECIPE <span>--set</span> prepare.heldout.max_rows=900" in on_cluster
    assert "What to change" not in render(line())


def test_what_became_of_publishing_is_shown(line: Callable[..., Line]) -> None:
    repo = {"repo": "a-gguf", "kind": "gguf", "url": "/out/a-gguf", "num_files": 1, "num_bytes": 1}
    published = Published(
        target="dir:/out", private=True, repos=[PublishedRepo(**repo)], seconds=2.5
    )
    links = (("Data preview", "data.html"),)
    done = render(line(Place(run_name="r", is_local=True, published=published, links=links)))
    assert "Published to dir:published: 1 directory." in done and "/out/a-gguf" in done
    assert '<a href="data.html">Data preview</a>' in done
    assert "publish: finished, 2.5 s, 1 directory" in done
    failed = render(line(Place(run_name="r", is_local=True, problem="the Hub is unreachable")))
    assert "Publishing to dir:published failed: the Hub is unreachable" in failed
    assert "publish: failed" in failed and "tuneline resume r" in failed
    assert 'class="banner good"' not in failed


def test_answers_that_never_equal_their_reference_are_a_warning(
    line: Callable[..., Line], run_dirs: dict
) -> None:
    assert "Read the answers" not in render(line())
    row = {"prompt": "p", "answer": "1.5", "text": "1.50"}
    for side in ("base", "tuned"):
        write_jsonl(Path(run_dirs[f"{side}_scores_dir"], "generations.jsonl"), [row])
    page = re.sub(r"<[^>]+>", " ", render(line()))
    assert "None of the 1 sampled answers of the tuned model equals its reference." in page
    assert "The references are short" in page


def test_fractions_are_percentages_on_the_whole_scale(line: Callable[..., Line]) -> None:
    small = {"base": 0.32, "tuned": 0.33, "difference": 0.01, "interval": (-0.02, 0.04), **BINARY}
    guard = new_comparison(task="x", role="guard", **small | {"outcome": "undecided"})
    decision = held(new_comparison(**small, outcome="undecided", lower=-0.015), guard)
    page = unescape(render(line(decision=decision)))
    cells = ("32.0 %", "33.0 %", "+1.0 points", "[-2.0, +4.0]")
    assert all(f">{cell}</td>" in page for cell in cells)
    chart = page[page.index("acc (%)</text>") :].partition("</svg>")[0]
    assert all(f">{tick}</text>" in chart for tick in ("0", "25", "50", "75", "100"))
    assert "32.0 \u2192 33.0 %" in page and "x +1.0 points (no clear change)" in page
    assert number_pair(2.412, 1.7) == ("2.41", "1.70") and number_pair(2.4, 0.004)[1] == "0.0040"
    assert number_pair(None, 1.7) == ("-", "1.7")
