"""One run to several targets, as the step does it, with the real client of the Hub."""

import json
from pathlib import Path

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
