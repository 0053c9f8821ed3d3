"""The plan as a run's first step, with the run's own credentials."""

import socket
from pathlib import Path
from typing import Any

import pytest

from tuneline.errors import RecipeError, UserError
from tuneline.html.markdown import escape_markdown
from tuneline.pipelines import kube_api
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.cluster import CRDS
from tuneline.pipelines.plan.run import run
from tuneline.pods import POD_NAME_VARIABLE
from tuneline.seals import broken_page_seal


def begin(path: Path, *assignments: str, **changed: str) -> list[Check]:
    recipe = find_recipe("llama3-8b-instruct", list(assignments))
    given = {
        "base_model": recipe.base_model,
        "train": recipe.train.model_dump_json(),
        "prepare": recipe.prepare.model_dump_json(),
        "quantize": recipe.quantize.model_dump_json(),
    }
    summary = path / "out" / "summary"
    return run(recipe.model_dump_json(), **{**given, **changed}, summary_path=str(summary)).checks


@pytest.fixture
def pod(kube_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(POD_NAME_VARIABLE, "line-plan-1")
    monkeypatch.setenv("NAMESPACE", "team")
    monkeypatch.setattr(kube_api, "BACKOFF_SECONDS", 0.001)
    return kube_server


def test_what_this_run_changed_of_the_recipe_counts(tmp_path: Path) -> None:
    checks = {check.name: check for check in begin(tmp_path, "placement.profile=t4")}
    assert checks["GPU memory"].verdict == "ok"
    page = (tmp_path / "out" / "summary").read_text()
    assert f"| ok | GPU memory | {escape_markdown(checks['GPU memory'].words)} |  |" in page
    assert broken_page_seal((tmp_path / "out" / "summary").read_bytes()) == ""
    # Outside a pod no cluster is asked.
    assert "API" not in checks
    with pytest.raises(UserError, match="cannot work as configured: GPU memory: .*70 B parameters"):
        begin(tmp_path, "placement.profile=t4", base_model="meta-llama/Llama-3.1-70B-Instruct")
    assert "| fail | GPU memory |" in (tmp_path / "out" / "summary").read_text()


def test_a_file_that_the_store_of_this_run_does_not_take(tmp_path: Path) -> None:
    large = {"base_model": "google/gemma-2-27b", "train": "{}"}
    wanted = ("placement.profile=h200", "train.gradient_checkpointing=true")
    with pytest.raises(UserError, match="file size: convert-gguf writes one file of 54 GB"):
        begin(tmp_path, *wanted, **large, store="minio://mlpipeline/v2/artifacts/line/summary")
    begin(tmp_path, *wanted, **large, store="gs://bucket/v2/artifacts/line/summary")


def test_a_recipe_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_IMAGE", "tuneline/light:0.1.0+abc")
    says = r"train.new_key: unknown key.*this step's image \(tuneline/light:0.1.0\+abc\)"
    with pytest.raises(RecipeError, match=says):
        begin(tmp_path, train='{"new_key": 1}')


def test_a_claim_that_is_missing_ends_the_run_before_its_first_pod_waits(
    pod: Any, tmp_path: Path
) -> None:
    for crd in CRDS:
        served = [{"name": "v1", "served": True, "storage": True}]
        group = crd.partition(".")[2]
        names = {"plural": crd.partition(".")[0], "kind": "K"}
        spec = {"group": group, "scope": "Namespaced", "names": names, "versions": served}
        pod.put("customresourcedefinitions", crd, spec=spec)
    assert not [c for c in begin(tmp_path) if c.verdict == "fail"]
    with pytest.raises(UserError, match="no claim cache in team: .* What to change: apply"):
        begin(tmp_path, "placement.cache_claim=cache")


def test_what_the_runs_account_may_not_see_is_no_reason_to_stop(pod: Any, tmp_path: Path) -> None:
    # The role of manifests/base: nothing of the cluster, no list of secrets.
    pod.forbidden = {"get customresourcedefinitions", "list secrets", "list nodes",
                     "list resourcequotas"}  # fmt: skip
    checks = begin(tmp_path)
    assert {check.name: check.verdict for check in checks}["CRDs"] == "unknown"
    assert not [check for check in checks if check.verdict == "fail"]


def test_an_api_that_is_away_is_no_reason_to_stop(pod: Any, tmp_path: Path) -> None:
    pod.down = 10**6
    *_, last = begin(tmp_path)
    assert (last.name, last.verdict) == ("API", "unknown")
    assert "503" in last.words


def test_an_api_that_takes_no_connection_is_no_reason_to_wait(
    pod: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        pod.host = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("KUBECONFIG", str(pod.write_kubeconfig(tmp_path / "other")))
    *_, last = begin(tmp_path)
    assert (last.name, last.verdict) == ("API", "unknown")
    assert "does a network policy allow it?" in last.words


def test_several_nodes_without_the_rights_to_make_a_job(pod: Any, tmp_path: Path) -> None:
    pod.forbidden = {"create trainjobs", "get customresourcedefinitions"}
    nodes = (
        "placement.num_nodes=2", "placement.shared_claim=shared", "placement.num_accelerators=4",
    )  # fmt: skip
    pod.put("persistentvolumeclaims", "shared", namespace="team",
            spec={"accessModes": ["ReadWriteMany"]}, status={"phase": "Bound"})  # fmt: skip
    with pytest.raises(UserError, match="rights: the run's service account may not create train"):
        begin(tmp_path, *nodes)
