"""Start, find, cancel and resume runs on Kubeflow Pipelines."""

import contextlib
import json
import re
import tempfile
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import kfp_server_api
from kfp import compiler

from tuneline.errors import ClusterError, RecipeError, UserError
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.inputs import local_problems
from tuneline.pipelines.kfp_client.connection import Client, readable_errors
from tuneline.pipelines.kfp_client.progress import CANCELING, ENDED, FAILED, state_of
from tuneline.pipelines.lint.lint import lint_file
from tuneline.recipe import Recipe
from tuneline.runtime.kfp_run import workflow_nodes
from tuneline.runtime.parameter_text import find_replaced

MAX_WORKFLOW_BYTES = 1_572_864
"""Largest request that etcd accepts by default. KFP resumes a run without Argo's compression."""


@contextlib.contextmanager
def compiled(
    recipe: Recipe, *, uncached: Collection[str] = (), archive: str | None = None
) -> Iterator[Path]:
    """Compile a recipe to a temporary file, and check the file as `tuneline lint` does.

    Args:
        recipe: the recipe to compile.
        uncached: names of steps whose results of earlier runs KFP must not reuse.
        archive: files that are sent with the run; None: there are none.

    Raises:
        RecipeError: a source is a path of this machine, or the pipeline has a security problem.
        UserError: the run has no step of a name in `uncached`.
    """
    problems = local_problems(recipe)
    if problems:
        raise RecipeError("; ".join(problems))
    with tempfile.TemporaryDirectory(prefix="tuneline-") as directory:
        path = Path(directory) / "pipeline.yaml"
        pipeline = finetune(recipe, archive=archive, uncached=uncached)
        compiler.Compiler().compile(pipeline, str(path))
        findings = lint_file(path)
        if findings:
            raise RecipeError(f"the pipeline was not sent because the lint found: {findings[0]}")
        yield path


def submit(
    client: Client,
    pipeline: Path,
    *,
    name: str,
    experiment: str,
    namespace: str | None = None,
    service_account: str | None = None,
    pipeline_root: str | None = None,
) -> str:
    """Start a run of a compiled pipeline and return the run's ID.

    Args:
        client: connection to the KFP API.
        pipeline: file of the compiled pipeline.
        name: display name of the run.
        experiment: KFP experiment of the run; created if it does not exist.
        namespace: the user's namespace, on Kubeflow with profiles.
        service_account: service account that the run's pods use; None: KFP's default.
        pipeline_root: URI under which KFP stores artifacts; None: KFP's default.

    Raises:
        UserError: Argo or Kubernetes would replace a part of the name or of the URI.
    """
    check_passed_on(name, pipeline_root)
    with readable_errors():
        group = client.create_experiment(experiment, namespace=namespace)
        run = client.run_pipeline(
            experiment_id=group.experiment_id,
            job_name=name,
            pipeline_package_path=str(pipeline),
            pipeline_root=pipeline_root,
            service_account=service_account,
        )
    return str(run.run_id)


def check_passed_on(name: str, pipeline_root: str | None) -> None:
    """Check the texts of a request that KFP passes to its own pods, where they cannot be decoded.

    Raises:
        UserError: Argo or Kubernetes would replace a part of a text.
    """
    for option, text in (("--name", name), ("--pipeline-root", pipeline_root or "")):
        found = find_replaced(text)
        if found is not None:
            raise UserError(
                f"{option} '{text}' contains '{found}', which Kubernetes or Argo would replace: "
                "write it without $$, $(, {{ and [[..."
            )


def recent_runs(client: Client, *, namespace: str | None = None, limit: int = 10) -> list[Any]:
    """Return the most recent runs, newest first."""
    with readable_errors():
        page = client.list_runs(
            page_size=limit, sort_by="created_at desc", namespace=namespace or None
        )
    return page.runs or []


def find_run(client: Client, name: str, *, namespace: str | None = None) -> Any:
    """Return the run with this ID, or the newest run with this name.

    Raises:
        UserError: there is no such run.
    """
    with readable_errors():
        if is_run_id(name):
            try:
                return client.get_run(name)
            except kfp_server_api.ApiException as error:
                if error.status != 404:
                    raise
        else:
            page = client.list_runs(
                page_size=1,
                sort_by="created_at desc",
                namespace=namespace or None,
                filter=by_display_name(name),
            )
            if page.runs:
                # A list of runs does not include their tasks, so the run is requested by its ID.
                return client.get_run(page.runs[0].run_id)
    names = [run.display_name for run in recent_runs(client, namespace=namespace)]
    hint = f"the newest are {', '.join(names)}" if names else "there are none yet"
    raise UserError(f"no run '{name}': {hint}")


def cancel(client: Client, run: Any) -> bool:
    """Cancel a run, and return whether it was not being cancelled already.

    Raises:
        UserError: the run has ended already.
    """
    if run.state in ENDED:
        raise UserError(f"run {run.display_name} has ended already: it is {state_of(run)}")
    if run.state == CANCELING:
        return False
    with readable_errors():
        client.terminate_run(run.run_id)
    return True


def resume(client: Client, run: Any, *, workflow: dict[str, Any] | None = None) -> None:
    """Re-run the failed steps of a run and the steps after them, but no finished step.

    Args:
        client: connection to the KFP API.
        run: the run, as the API returned it.
        workflow: the run's workflow, if it can be read: one that is too large is refused before KFP
            deletes the failed pods.

    Raises:
        UserError: the run did not fail and was not cancelled, or is too large.
    """
    if run.state not in FAILED:
        raise UserError(
            f"run {run.display_name} is {state_of(run)}: only a run that failed or was cancelled "
            "can be resumed"
        )
    too_large = UserError(
        f"run {run.display_name} cannot be resumed, because KFP 2.17 cannot write a workflow of "
        "more than 1.5 MiB: submit the recipe again; finished steps are taken from the cache"
    )
    if workflow is not None:
        whole = {**workflow, "status": {"nodes": workflow_nodes(workflow)}}
        if len(json.dumps(whole, separators=(",", ":"))) > MAX_WORKFLOW_BYTES:
            raise too_large
    try:
        with readable_errors():
            client.resume_run(run.run_id)
    except ClusterError as error:
        if re.search(r"larger than max|request is too large", str(error)):
            raise too_large from None
        raise


def pipeline_of(client: Client, run: Any) -> dict[str, Any]:
    """Return the compiled pipeline of a run."""
    spec = run.pipeline_spec
    if spec is None and run.pipeline_version_reference is not None:
        reference = run.pipeline_version_reference
        with readable_errors():
            version = client.get_pipeline_version(
                reference.pipeline_id, reference.pipeline_version_id
            )
        spec = version.pipeline_spec
    return dict(spec or {"root": {"dag": {"tasks": {}}}})


def by_display_name(name: str) -> str:
    """Return the filter that selects one display name in requests to KFP."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def is_run_id(name: str) -> bool:
    """Return whether `name` is a run ID (a UUID)."""
    try:
        return str(uuid.UUID(name)) == name.lower()
    except ValueError:
        return False
