"""One run to several targets, as the step does it, with the real client of the Hub."""

import json
from pathlib import Path

import model_registry_server
import registry_server
from publish_cases import REPOS, TOKEN, publish, recipe_of

from tuneline.artifacts import Published


def test_a_run_publishes_to_all_of_its_targets(run_dir: Path, hub, tmp_path: Path) -> None:
    """The Hub, a claim and a directory get the same files; a second run changes nothing."""
    claims = tmp_path / "claims"
    (claims / "served").mkdir(parents=True)
    targets = ["claim:served/team", f"dir:{tmp_path}/out", "me/mine"]
    recipe = recipe_of().model_copy(update={"publish_to": targets})

    def run(out: str) -> Published:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "TUNELINE_CLAIMS": str(claims)}
        done = publish(run_dir, json.dumps(targets), out, recipe=recipe, **environment)
        assert done.returncode == 0, done.stderr
        return Published.read(run_dir / out)

    record = run("first")
    assert [repo.target for repo in record.repos] == [
        each for each in ("me/mine", "claim:served/team", f"dir:{tmp_path}/out") for _ in REPOS
    ]
    for repo in REPOS:
        name = repo.rpartition("/")[2]
        kept = {file: hub.content(repo, file) for file in hub.repos[repo]["files"]}
        for root in (claims / "served" / "team", tmp_path / "out"):
            there = {
                path.relative_to(root / name).as_posix(): path.read_bytes()
                for path in (root / name).rglob("*")
                if path.is_file()
            }
            assert there == {file: kept[file] for file in kept if file != ".gitattributes"}
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    assert "publish_to: me/mine\n" in card and str(tmp_path) not in card and "served" not in card
    metadata = record.metadata()
    assert metadata["merged"] == f"{hub.url}/me/mine"
    assert metadata["merged_2"] == "pvc://served/team/mine"
    assert metadata["gptq-4bit_3"] == (tmp_path / "out" / "mine-gptq-4bit").as_uri()
    commits = {repo: hub.repos[repo]["commits"][-1] for repo in REPOS}
    run("second")
    assert {repo: hub.repos[repo]["commits"][-1] for repo in REPOS} == commits
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        repo.rpartition("/")[2] for repo in REPOS
    )


def test_a_run_publishes_to_registries(run_dir: Path, tmp_path: Path) -> None:
    """An OCI registry and MLflow get the files, and the Model Registry the address of the first."""
    targets = ["mlflow:team-mine", "model-registry:team-mine"]
    with registry_server.serving() as oci, model_registry_server.serving() as addresses:
        targets.append(f"oci://{oci.host}/team")
        recipe = recipe_of().model_copy(update={"publish_to": targets})
        environment = {
            "HOME": str(tmp_path),
            "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "MODEL_REGISTRY_URL": addresses.url,
        }
        done = publish(run_dir, json.dumps(targets), "out", recipe=recipe, **environment)
        assert done.returncode == 0, done.stderr
        card = oci.files("team/mine", "v1")["README.md"].decode()
        registered = addresses.addresses("team-mine-gptq-4bit")
    record = Published.read(run_dir / "out")
    names = [repo.rpartition("/")[2] for repo in REPOS]
    assert [repo.url for repo in record.repos] == [
        *(f"models:/team-{name}/1" for name in names),
        *(f"oci://{oci.host}/team/{name}:v1" for name in names),
        *(f"model-registry:team-{name}/v1" for name in names),
    ]
    assert registered == {"v1": [f"oci://{oci.host}/team/mine-gptq-4bit:v1"]}
    assert record.metadata()["gptq-4bit_3"] == "model-registry:team-mine-gptq-4bit/v1"
    # The card names the kinds of the targets alone.
    assert oci.host not in card and "- mlflow\n" in card and "- model-registry\n" in card
    # None of them is storage that KServe reads.
    served = [path.read_text() for path in (run_dir / "out").rglob("*.yaml")]
    assert served and all("pvc://CLAIM/mine" in text for text in served)
