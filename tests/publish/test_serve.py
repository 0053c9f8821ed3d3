"""`tuneline serve` of what was published, with kubernetes' own client and a server on localhost."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from kube_server import RESOURCES, KubeServer
from publish_cases import publish, recipe_of, write_again
from typer.testing import CliRunner

from tuneline.errors import ClusterError, CredentialsError, TunelineError, UserError
from tuneline.pipelines.cli.main import app
from tuneline.placement import PlacementConfig
from tuneline.serving.inference_service import GROUP, KIND, PLURAL, VERSION

SIZES = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_size": 64, "max_position_embeddings": 2048,
}  # fmt: skip


def serve(*arguments: str) -> str:
    """Run the command; return what it prints, or raise the error that it ends with."""
    result = CliRunner().invoke(app, ["serve", *arguments])
    if isinstance(result.exception, TunelineError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_serve(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "merged" / "config.json").write_text(json.dumps(SIZES))
    write_again(run_dir)
    placement = PlacementConfig(profile="l4", node_selector={"pool": "serving"}, queue="team")
    recipe = recipe_of(publish_to="me/mine").model_copy(update={"placement": placement})
    run = tmp_path / "runs" / "mine"
    out = run / "artifacts" / "tuneline-1" / "publish" / "published"
    out.parent.mkdir(parents=True)
    done = publish(run_dir, f"dir:{tmp_path}/tree", str(out), recipe=recipe)
    assert done.returncode == 0, done.stderr
    (run / "recipe.yaml").write_text(recipe.model_dump_json())
    (run / "run.log").write_text("")

    # The tree has the profile alone, and the run's own files have the placement of the recipe.
    tree = list(yaml.safe_load_all(serve(str(tmp_path / "tree"), "--dry-run")))
    own = list(yaml.safe_load_all(serve(str(run), "--dry-run", "--namespace", "prod")))
    names = ["mine", "mine-gguf-q8-0"]
    assert sorted(each["metadata"]["name"] for each in tree) == names
    assert sorted(each["metadata"]["name"] for each in own) == names
    assert {each["metadata"]["namespace"] for each in own} == {"prod"}
    assert "team" not in json.dumps(tree) and json.dumps(own).count("queue-name") == 2
    (merged,) = (each for each in own if each["metadata"]["name"] == "mine")
    assert merged["spec"]["predictor"]["nodeSelector"] == {"pool": "serving"}
    printed = serve(str(run), "--dry-run")
    assert "# lora: not served. The adapter was trained on 4-bit weights" in printed
    assert "# gptq-4bit: not served. The model's config.json names no architecture" in printed

    moved = ("--format", "merged", "--storage", "pvc://models/team/")
    (moved_service,) = yaml.safe_load_all(serve(str(run), *moved, "--dry-run"))
    assert moved_service["spec"]["predictor"]["storageUris"][0]["uri"] == "pvc://models/team/mine"

    for arguments, said in {
        (): "can be served as merged, q8_0: choose one with --format",
        ("--format", "merged"): "published into a directory, which KServe cannot read",
        ("--format", "lora"): r"choose --format from merged, q8_0\. lora: not served",
        ("--format", "f16"): "no InferenceService for f16",
        ("--image", "x/y:1"): "--image is the image of one server",
    }.items():
        with pytest.raises(UserError, match=said):
            serve(str(run), *arguments)
    with pytest.raises(UserError, match="there is no local run, no directory and no Hub"):
        serve("nothing-of-that-name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no serving/: an older version"):
        serve(str(tmp_path / "empty"))
    shutil.copytree(run, tmp_path / "held")
    shutil.rmtree(tmp_path / "held" / "artifacts")
    with pytest.raises(UserError, match="published nothing, so there is nothing to serve"):
        serve(str(tmp_path / "held"))

    with KubeServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
        asked = [str(run), *moved, "--namespace", "prod"]
        with pytest.raises(UserError, match="has no inferenceservices.serving.kserve.io"):
            serve(*asked)
        server.resources = {**RESOURCES, PLURAL: (GROUP, VERSION, KIND, True)}
        assert "inferenceservice mine: created in namespace prod" in serve(*asked)
        stored = server.objects[PLURAL, "prod", "mine"]
        assert stored["spec"] == moved_service["spec"]
        again = serve(*asked, "--image", "mirror.example.com/vllm:1", "--service-account", "s3")
        assert "inferenceservice mine: replaced in namespace prod" in again
        predictor = server.objects[PLURAL, "prod", "mine"]["spec"]["predictor"]
        assert predictor["serviceAccountName"] == "s3"
        assert predictor["containers"][0]["image"] == "mirror.example.com/vllm:1"
        server.objects[PLURAL, "prod", "mine"]["metadata"]["labels"] = {}
        with pytest.raises(UserError, match="which tuneline did not write"):
            serve(*asked)
        server.forbidden = {f"create {PLURAL}"}
        with pytest.raises(CredentialsError, match="refuses to write InferenceService mine"):
            serve(*asked[:-1], "other")
        server.forbidden = set()
        server.down = 1000
        with pytest.raises(ClusterError, match="answered 503"):
            monkeypatch.setattr("tuneline.pipelines.kube_api.BACKOFF_SECONDS", 0.0)
            serve(*asked)
