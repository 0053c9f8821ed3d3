"""Write the page of a run from the records of its artifacts."""

import json
import logging
import time
from pathlib import Path

from tuneline.artifacts import (
    GENERATIONS_FILE,
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    RunHeader,
    RunSummary,
    Scores,
    TrainingSummary,
    new_directory,
    read_jsonl,
)
from tuneline.html.page import render_page
from tuneline.notify.message import encode_scores, scores_of
from tuneline.recorded_recipe import recorded_recipe
from tuneline.records.in_words import verdict_sentence
from tuneline.report import (
    answers,
    comparison,
    exports,
    hold,
    overview,
    provenance,
    scores,
    training,
)
from tuneline.report.records import Line, Place
from tuneline.runtime.parameter_text import decode_list, encode_list, list_in_words
from tuneline.runtime.redaction import redacted
from tuneline.runtime.termination import Ending, leave

logger = logging.getLogger(__name__)


def run(
    header: RunHeader,
    *,
    run_name: str = "",
    target: str | None = None,
    publish_config: str | None = None,
    quantize_config: str | None = None,
    base_model_dir: str,
    dataset_dir: str,
    adapter_dir: str,
    merged_dir: str,
    base_scores_dir: str,
    tuned_scores_dir: str,
    decision_dir: str,
    exports_dirs: list[str],
    page_path: str,
    summary_dir: str,
) -> RunSummary:
    """Write the page and the summary of a run.

    Args:
        header: the whole recipe.
        run_name: name of the run, for the page's heading. Default: the recipe's name.
        target: where the run publishes. Default: `publish_to` of the recipe.
        publish_config: the section `publish` of the run as JSON. Default: that of the recipe.
        quantize_config: the section `quantize` of the run as JSON. Default: that of the recipe.
        base_model_dir: directory of the `base_model` artifact, or a copy of its record.
        dataset_dir: directory of the `dataset` artifact, or a copy of its record.
        adapter_dir: directory of the `adapter` artifact, or a copy of its record.
        merged_dir: directory of the `merged` artifact, or a copy of its record.
        base_scores_dir: directory of the `scores` artifact of the base model.
        tuned_scores_dir: directory of the `scores` artifact of the tuned model.
        decision_dir: directory of the `decision` artifact.
        exports_dirs: directories of the `quantized` artifacts, or copies of their records, one per
            format; may be empty.
        page_path: the HTML file to write.
        summary_dir: new directory for summary.json.

    Raises:
        WorldError: an artifact has no record, or an export that the recipe asks for is missing.
    """
    started = time.monotonic()
    line = read_line(
        header,
        place=Place(run_name=run_name, ended=now()),
        target=target,
        publish_config=publish_config,
        quantize_config=quantize_config,
        base_model_dir=base_model_dir,
        dataset_dir=dataset_dir,
        adapter_dir=adapter_dir,
        merged_dir=merged_dir,
        base_scores_dir=base_scores_dir,
        tuned_scores_dir=tuned_scores_dir,
        decision_dir=decision_dir,
        exports_dirs=exports_dirs,
    )
    page = Path(page_path)
    page.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(summary_dir) as directory:
        page.write_text(render(line), encoding="utf-8")
        summary = RunSummary(
            recipe=header.name,
            verdict=line.decision.verdict,
            reason=line.decision.reason,
            remarks=line.decision.remarks,
            comparisons=line.decision.comparisons,
            exports=line.exports,
            export_verdicts=line.decision.exports,
            differs_from_recipe=list(line.recipe.differences),
            seconds=round(time.monotonic() - started, 3),
        )
        summary.write(directory, header)
    logger.info("report of %s: %s, %d bytes", header.name, page, page.stat().st_size)
    # The gate may have come from the cache, but the report never does.
    scores_text = encode_scores(scores_of(summary.comparisons))
    leave(
        Ending(
            step="report",
            result=summary.verdict,
            text=verdict_sentence(summary.verdict, summary.reason, summary.comparisons),
            scores=scores_text,
        )
    )
    return summary


def now() -> str:
    """Return the date and the time, as pages show them."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def read_line(
    header: RunHeader,
    *,
    place: Place,
    target: str | None,
    publish_config: str | None,
    quantize_config: str | None = None,
    base_model_dir: str,
    dataset_dir: str,
    adapter_dir: str,
    merged_dir: str,
    base_scores_dir: str,
    tuned_scores_dir: str,
    decision_dir: str,
    exports_dirs: list[str],
) -> Line:
    """Read the records of a run; the arguments are those of `run`, and what else is known of it.

    Raises:
        WorldError: an artifact has no record, or an export that the recipe asks for is missing.
    """
    target = encode_list(header.publish_to) if target is None else target
    made = [QuantizedModel.read(path) for path in exports_dirs]
    header.check_exports((export.format for export in made), quantize_config)
    origin, dataset = ModelOrigin.read(base_model_dir), DatasetManifest.read(dataset_dir)
    trained, merge = TrainingSummary.read(adapter_dir), MergeProof.read(merged_dir)
    decision = Decision.read(decision_dir)
    recipe = recorded_recipe(
        header,
        origin=origin,
        dataset=dataset,
        training=trained,
        merge=merge,
        exports=made,
        decision=decision,
        target=target,
        publish=json.loads(publish_config) if publish_config else {},
    )
    return Line(
        header=header,
        recipe=recipe,
        target=redacted(list_in_words(decode_list(target))),
        origin=origin,
        dataset=dataset,
        training=trained,
        merge=merge,
        exports=made,
        base_scores=Scores.read(base_scores_dir),
        tuned_scores=Scores.read(tuned_scores_dir),
        base_generations=read_jsonl(Path(base_scores_dir, GENERATIONS_FILE)),
        tuned_generations=read_jsonl(Path(tuned_scores_dir, GENERATIONS_FILE)),
        decision=decision,
        place=place,
    )


def render(line: Line) -> str:
    """Return the page as HTML."""
    header = line.header
    about = redacted(f"{line.origin.source} tuned on {line.dataset.source}")
    description = redacted(header.description.rstrip("."))
    name = line.place.run_name or header.name
    ended = f"Finished {line.place.ended}" if line.place.ended else ""
    subtitle = [ended, *([f"recipe {header.name}"] if name != header.name else [])]
    subtitle += [text for text in (description, about) if text]
    cards = [
        overview.picture(line),
        scores.scores(line),
        scores.generations(line),
        training.training(line),
        training.data(line),
        exports.exports(line),
        comparison.card(line),
        provenance.provenance(line),
    ]
    return render_page(
        name,
        [card for card in cards if card],
        " - ".join(text for text in subtitle if text),
        lead="".join(
            part(line)
            for part in (
                overview.verdict,
                overview.unequal_answers,
                answers.answers,
                hold.card,
                overview.remarks,
                overview.other_values,
                overview.headline,
            )
        ),
    )
