"""What a recipe names is looked at before a run: model, data, target, trackers, packages."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub
from registry_server import Fault, serving

from tuneline.pipelines.plan.early import check_early
from tuneline.recipe import Recipe

ROWS = "question,answer,choices\n" + "".join(f"Q{n},A{n},\n" for n in range(5))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # Nobody's network: the look-ups of the Hub are refused at once.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")


def recipe(rows: Path, **changes: Any) -> Recipe:
    values = {
        "name": "mine",
        "base_model": "builtin:smollm2-135m",
        "dataset": str(rows),
        "publish_to": f"dir:{rows.parent}/out",
        "prepare": {"columns": {"prompt": "question", "completion": "answer"}},
        "evaluate": {"tasks": ["heldout_perplexity"]},
    }
    return Recipe.parse({**values, **changes})


def verdicts(checked: Recipe, *, is_local: bool = True) -> dict[str, str]:
    return {check.name: check.verdict for check in check_early(checked, is_local=is_local)}


def words(checked: Recipe, name: str, *, is_local: bool = True) -> str:
    (found,) = [c for c in check_early(checked, is_local=is_local) if c.name == name]
    return f"{found.verdict}: {found.words}"


def test_a_recipe_that_can_run(rows: Path) -> None:
    assert verdicts(recipe(rows)) == {"model": "ok", "data": "ok", "target": "ok"}
    assert verdicts(recipe(rows), is_local=False) == {"model": "ok", "data": "ok"}


def test_a_webhook_needs_its_variable(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_WEBHOOK", raising=False)
    told = recipe(rows, notify=[{"webhook": "MY_WEBHOOK"}])
    assert words(told, "notify") == (
        "fail: notify names the environment variable MY_WEBHOOK, which is not set here"
    )
    assert words(told, "notify", is_local=False).startswith("warn: ")
    monkeypatch.setenv("MY_WEBHOOK", "https://example.com/s3cr3t")
    assert words(told, "notify") == "ok: MY_WEBHOOK is set"
    secrets = {"secrets": {"alerts": {"url": "MY_WEBHOOK"}}}
    mapped = recipe(rows, notify=[{"webhook": "MY_WEBHOOK"}], placement=secrets)
    assert words(mapped, "notify", is_local=False) == "ok: MY_WEBHOOK is set by placement"
    plain = {"environment": {"MY_WEBHOOK": "http://gateway.monitoring:9091"}}
    mapped = recipe(rows, notify=[{"webhook": "MY_WEBHOOK"}], placement=plain)
    assert words(mapped, "notify", is_local=False) == "ok: MY_WEBHOOK is set by placement"


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        ({"columns": {"prompt": "q"}}, "maps prompt to 'q', but {rows} has no such column: its co"),
        ({}, "the columns (question, answer, choices) fit no known format for method sft"),
        ({"columns": {"promt": "question"}}, "promt"),
        ({"format": "messages", "columns": {"messages": "question"}}, "none of the first 5 rows"),
        ({"format": "kto"}, "format kto is for method kto, but prepare.method is sft"),
        ({"split": "test"}, "test"),
    ],
)
def test_rows_that_do_not_fit(rows: Path, prepare: dict[str, Any], says: str) -> None:
    for is_local in (True, False):
        said = words(recipe(rows, prepare=prepare), "data", is_local=is_local)
        assert said.startswith("fail: ") and says.format(rows=rows) in said


def test_a_choice_needs_choices(rows: Path) -> None:
    assert "fail: evaluate.tasks has heldout_choice, but " in words(
        recipe(rows, evaluate={"tasks": ["heldout_choice"]}), "tasks"
    )
    rows.write_text('question,answer,choices\nQ,A,"[""A"", ""B""]"\n')
    asked = recipe(rows, evaluate={"tasks": ["heldout_choice"]})
    assert "tasks" not in verdicts(asked)


def test_an_empty_file_and_one_that_is_gone(rows: Path) -> None:
    checked = recipe(rows)
    rows.write_text("")
    assert words(checked, "data").startswith("fail: ")
    rows.unlink()
    assert f"fail: there is no file or directory {rows}" in words(checked, "data")
    assert words(checked, "data", is_local=False).startswith(f"unknown: {rows} is not on this ma")


@pytest.mark.parametrize(
    ("model", "verdict", "says"),
    [
        ("builtin:smollm3", "fail", "there is no built-in model 'smollm3': choose one of"),
        ("{here}/empty", "fail", "has no safetensors weights"),
        ("{here}/rows.csv", "fail", "is a file of another kind"),
        ("{here}/bad.gguf", "fail", "is not a GGUF file"),
        ("{here}/absent", "fail", "there is no directory or file"),
        ("org/model", "unknown", "look up org/model at http://127.0.0.1:1"),
    ],
)
def test_a_model_that_cannot_be_fetched(rows: Path, model: str, verdict: str, says: str) -> None:
    (rows.parent / "empty").mkdir()
    (rows.parent / "bad.gguf").write_bytes(b"nothing")
    said = words(recipe(rows, base_model=model.format(here=rows.parent)), "model")
    assert said.startswith(f"{verdict}: ") and says in said


def test_a_target_that_cannot_be_written(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = words(recipe(rows, publish_to=f"dir:{rows}/out"), "target")
    assert said == f"fail: publish_to is {rows}/out, but {rows} is a file"
    assert "needs a token with write access" in words(recipe(rows, publish_to="me/x"), "target")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert words(recipe(rows, publish_to="me/x"), "target").startswith("unknown: ")
    several = recipe(rows, publish_to=["me/x", f"dir:{rows.parent}/out", "claim:none/x"])
    found = [check for check in check_early(several, is_local=True) if check.name == "target"]
    assert [check.verdict for check in found] == ["unknown", "ok", "fail"]
    assert "the claim none is not mounted here" in found[2].words
    with serving() as registry:
        in_registry = recipe(rows, publish_to=f"oci://{registry.host}/team")
        assert words(in_registry, "target") == f"ok: oci://{registry.host}/team/mine can be written"
        registry.faults = [Fault("POST", "/team/mine/", 403, "DENIED")]
        assert "fail: begin an upload to mine at oci://" in words(in_registry, "target")
        assert registry.written == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = words(recipe(rows, publish_to="mlflow:support"), "target")
    assert said.startswith("fail: publish_to is mlflow:support, but MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MODEL_REGISTRY_URL", raising=False)
    referring = recipe(rows, publish_to=["model-registry:support", "claim:none/y"])
    found = [check.words for check in check_early(referring, is_local=True)]
    assert any("but MODEL_REGISTRY_URL is ''. Set it to the reg" in each for each in found)
    # The pods have a token of their own.
    assert "target" not in verdicts(recipe(rows, publish_to="me/x"), is_local=False)


@pytest.mark.parametrize(
    ("account", "says"),
    [
        ({"name": "me"}, "ok: me may write to me/x"),
        ({"name": "you", "orgs": [{"name": "me"}]}, "ok: you may write to me/x"),
        ({"name": "you"}, "fail: HF_TOKEN is of you, which is no member of me: publish to one of"),
        (
            {"name": "me", "auth": {"accessToken": {"role": "read"}}},
            "fail: HF_TOKEN of me may only read, but me/x has to be written",
        ),
    ],
)
def test_the_account_of_a_token(
    rows: Path, monkeypatch: pytest.MonkeyPatch, account: dict[str, Any], says: str
) -> None:
    hub = Hub()
    hub.account = account
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    said = words(recipe(rows, publish_to="me/x"), "target")
    hub.close()
    assert said.startswith(says)


def test_a_package_that_is_absent(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(rows, train={"track": ["wandb"]})
    monkeypatch.setitem(sys.modules, "wandb", None)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("gptqmodel", "wandb") else real(name, *rest),
    )
    assert "fail: train.track names wandb, but the package wandb is not installed" in words(
        asked, "trackers"
    )
    gptq = recipe(rows, quantize={"gguf": [], "gptq": ["gptq-4bit"]})
    assert words(gptq, "packages") == "fail: the modules gptqmodel are not installed here"
    assert "packages" not in {
        check.name for check in check_early(gptq, is_local=True, has_packages=True)
    }


def test_the_checks_load_no_torch(rows: Path) -> None:
    program = (
        "import sys\n"
        "from tuneline.recipe import Recipe\n"
        "from tuneline.pipelines.plan.early import check_early\n"
        f"checks = check_early(Recipe.parse({recipe(rows).model_dump_json()!r}), is_local=True)\n"
        "assert {check.verdict for check in checks} == {'ok'}, checks\n"
        "loaded = {'torch', 'kfp', 'bitsandbytes', 'lm_eval'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
