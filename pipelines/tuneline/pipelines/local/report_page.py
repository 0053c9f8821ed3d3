"""The report of a run on this machine: the page of the step report, with what is known at the end.

The step writes its page before the model is published, and without knowing where the files of the
run are. When the run has ended, the page is rendered again from the same records.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from tuneline.artifacts import Published, RunHeader, RunSummary
from tuneline.errors import TunelineError
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.local.run_dir import RUNS_DIR, LocalRun
from tuneline.report.records import Place
from tuneline.report.run import read_line, render
from tuneline.runtime.parameter_text import decode_text

logger = logging.getLogger(__name__)

_BEGIN = re.compile(r"Got executor_input:")
OTHER_PAGES = (
    ("Data preview", "dataset", "statistics", "data.html"),
    ("Training curves", "adapter", "curves", "curves.html"),
)
"""Pages of other steps: name, input of report beside which the page is, its file, name of its copy
beside the report."""


def finished_page(run: LocalRun) -> str | None:
    """Return the page of a run whose report step has finished; None if it cannot be rendered.

    Copies the pages that it links to into the directory of the run.
    """
    inputs = _inputs_of_report(run)
    summary_path = run.summary_path()
    if inputs is None or summary_path is None:
        return None
    artifacts, parameters = inputs
    try:
        line = read_line(
            RunHeader.parse(parameters["recipe"]),
            place=_place(run, artifacts, RunSummary.read(summary_path.parent)),
            target=decode_text(parameters["target"]),
            publish_config=parameters.get("publish_config"),
            quantize_config=parameters.get("quantize_config") or None,
            exports_dirs=[path for kind in EXPORT_KINDS for path in artifacts.get(kind, ())],
            **{
                f"{name}_dir": artifacts[name][0]
                for name in (
                    *("base_model", "dataset", "adapter", "merged"),
                    *("base_scores", "tuned_scores", "decision"),
                )
            },
        )
    except (TunelineError, OSError, KeyError) as error:
        logger.warning("the report is that of the step report, as written there: %s", error)
        return None
    return render(line)


def _place(run: LocalRun, artifacts: dict[str, list[str]], summary: RunSummary) -> Place:
    published = published_of(run)
    failed = next((step for step in run.steps() if step.step == "publish"), None)
    problem = ""
    if published is None and failed is not None:
        problem = failed.message or "the step was stopped before its end"
    merged = Path(artifacts["merged"][0]).parent / "merged"
    is_below_runs = run.directory.parent.name == str(RUNS_DIR)
    return Place(
        run_name=run.name if is_below_runs else str(run.directory),
        ended=summary.created_at.replace("T", " ")[:16] + " UTC",
        is_local=True,
        working_dir=str(run.directory.parent.parent) if is_below_runs else "",
        published=published,
        problem=problem,
        links=tuple(_copy_pages(run, artifacts)),
        files=(("Merged model", str(merged)),) if merged.is_dir() else (),
    )


def published_of(run: LocalRun) -> Published | None:
    """Return the record of what the last attempt of a run published; None if it did not."""
    found = run.results(f"publish*/*/{Published.filename}")
    return Published.read(found[-1].parent) if found else None


def _copy_pages(run: LocalRun, artifacts: dict[str, list[str]]) -> list[tuple[str, str]]:
    links = []
    for label, source, name, copy in OTHER_PAGES:
        page = Path(artifacts[source][0]).parent / name
        if page.is_file():
            shutil.copyfile(page, run.directory / copy)
            links.append((label, copy))
    return links


def _inputs_of_report(run: LocalRun) -> tuple[dict[str, list[str]], dict[str, Any]] | None:
    """Return the paths of the artifacts, by input, and the parameters of the last report step.

    Some artifacts are in the directories of earlier runs, from the cache. KFP logs what a component
    gets as JSON. Publish may run beside report, and then the log has the lines of both.
    """
    text = "\n".join(
        line
        for section in run.sections()
        if section.name in ("report", "publish")
        for line in section.lines
    )
    for begin in reversed([found.end() for found in _BEGIN.finditer(text)]):
        try:
            values, _ = json.JSONDecoder().raw_decode(text[begin:].lstrip())
            inputs = values["inputs"]
            if "page" not in values["outputs"]["artifacts"]:
                continue
            artifacts = {
                name: [each["uri"] for each in found["artifacts"]]
                for name, found in inputs["artifacts"].items()
            }
            return artifacts, inputs["parameterValues"]
        except (ValueError, KeyError, TypeError, AttributeError):
            # Lines of both steps are mixed.
            continue
    logger.warning("the log of the step report does not say which artifacts it read")
    return None
