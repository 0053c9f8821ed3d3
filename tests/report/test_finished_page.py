"""The page of a local run is rendered again when the run has ended, from the artifacts it names."""

import json
from pathlib import Path

import pytest
from tests.notify.webhook_server import WebhookServer

from tuneline.artifacts import Published, PublishedRepo, RunHeader
from tuneline.notify import NotifyConfig
from tuneline.pipelines.cli.run import write_report
from tuneline.pipelines.local.notification import tell
from tuneline.pipelines.local.run_dir import LocalRun
from tuneline.recipe import Recipe
from tuneline.recipe_file.yaml_document import dump_document
from tuneline.report.run import run

# How KFP 2.17 logs a task of its subprocess runner; the lines of two tasks may follow each other.
LOG = """
22:18:52.849 - INFO - Executing task '{name}'
22:18:52.850 - INFO - Streamed logs:

    [KFP Executor 2026-11-27 22:18:53,246 INFO]: Got executor_input:
{given}
"""
END = "22:18:55.849 - INFO - Task '{name}' finished with status SUCCESS\n"


@pytest.fixture
def local_run(recipe: Recipe, run_dirs: dict, tmp_path: Path) -> LocalRun:
    """A run that has ended, without publishing; its dataset came from the cache of another run."""
    directory = tmp_path / "runs" / "demo-1"
    report = directory / "artifacts" / "tuneline-demo-1" / "report"
    report.mkdir(parents=True)
    text = recipe.model_dump_json()
    (directory / "recipe.yaml").write_text(dump_document(recipe.model_dump(mode="json")))
    places = {"page_path": str(report / "page"), "summary_dir": str(report / "summary")}
    run(RunHeader.parse(text), **run_dirs | places)
    for name in ("dataset", "adapter"):
        record = Path(run_dirs[f"{name}_dir"])
        (record.parent / f"{name}-task").mkdir()
        record.rename(record.parent / f"{name}-task" / "record")
        run_dirs[f"{name}_dir"] = str(record.parent / f"{name}-task" / "record")
    (tmp_path / "dataset-task" / "statistics").write_text("<p>rows</p>")
    (tmp_path / "adapter-task" / "curves").write_text("<p>curves</p>")
    inputs = {
        name.removesuffix("_dir"): [path]
        for name, path in run_dirs.items()
        if name.endswith("_dir") and name != "summary_dir"
    }
    exports = run_dirs["exports_dirs"]
    inputs |= {"gguf": exports[:4], "gptq": exports[4:]}
    artifacts = {k: {"artifacts": [{"uri": path} for path in v]} for k, v in inputs.items()}
    parameters = {"recipe": text, "target": "dir:published", "publish_config": "{}"}
    given = {
        "inputs": {"artifacts": artifacts, "parameterValues": parameters},
        "outputs": {"artifacts": {"page": {}, "summary": {}}},
    }
    shown = json.dumps(given, indent=4).replace("\n", "\n    ")
    log = "22:18:31.130 - INFO - Running pipeline: 'tuneline-demo'\n"
    log += LOG.format(name="report", given=f"    {shown}")
    log += LOG.format(name="publish", given='    {"inputs": {}, "outputs": {"artifacts": {}}}')
    (directory / "run.log").write_text(log + END.format(name="publish"))
    return LocalRun(directory)


def publish(run: LocalRun) -> None:
    path = run.directory / "artifacts" / "tuneline-demo-1" / "publish" / "published"
    path.mkdir(parents=True)
    repo = {"repo": "a", "kind": "merged", "url": "/out/a", "num_files": 1, "num_bytes": 1}
    Published(target="dir:published", private=True, repos=[PublishedRepo(**repo)]).write(path)


def add_events(run: LocalRun, *events: dict) -> None:
    lines = [json.dumps({"step": "publish", "time": 1.0, **event}) for event in events]
    run.events_path.write_text("".join(f"{line}\n" for line in lines))


def test_the_page_of_a_published_run(local_run: LocalRun, tmp_path: Path) -> None:
    publish(local_run)
    page = write_report(local_run).read_text(encoding="utf-8")
    assert "<h1>demo-1</h1>" in page and "Published to dir:published: 1 directory." in page
    assert "tuneline chat demo-1" in page and str(tmp_path) in page
    assert '<a href="data.html">' in page and '<a href="curves.html">' in page
    assert (local_run.directory / "data.html").read_text() == "<p>rows</p>"


def test_the_page_of_a_run_whose_publishing_failed(local_run: LocalRun) -> None:
    add_events(
        local_run,
        {"event": "started"},
        {"event": "failed", "seconds": 1, "kind": "HubError", "message": "the Hub is unreachable"},
    )
    page = write_report(local_run).read_text(encoding="utf-8")
    assert "Publishing to dir:published failed: the Hub is unreachable" in page
    assert "Scores before and after training" in page


def test_without_the_log_the_page_of_the_step_is_kept(local_run: LocalRun) -> None:
    local_run.log_path.write_text("")
    page = write_report(local_run).read_text(encoding="utf-8")
    assert "<h1>demo</h1>" in page and "before the model was published" in page


def test_webhooks_are_told_of_a_local_run(
    local_run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(local_run)
    page = write_report(local_run)
    webhooks = [NotifyConfig(webhook="MINE")]
    with WebhookServer() as server:
        monkeypatch.setenv("MINE", server.url)
        assert tell(webhooks, "demo", local_run, page) == []
        assert tell(webhooks, "demo", local_run, page, stopped="stopped by Ctrl-C") == []
        add_events(
            local_run,
            {"event": "started", "step": "train"},
            {"event": "failed", "step": "train", "seconds": 1, "kind": "DataError"},
        )
        assert tell(webhooks, "demo", local_run, page, failure="step train failed: no rows") == []
    good, stopped, failed = server.bodies
    assert (good["event"], good["run"]) == ("promoted", "demo-1")
    assert good["text"].startswith("acc rose from 0.310 to 0.870 on 200 unseen questions")
    assert good["links"] == {"report": str(page), "published to": "dir:published"}
    assert (stopped["event"], stopped["text"]) == ("cancelled", "The run was stopped by Ctrl-C.")
    assert (failed["event"], failed["step"], failed["cause"]) == (
        *("failed", "train"),
        "step train failed: no rows",
    )
    assert failed["links"]["continue"] == "tuneline resume demo-1"
