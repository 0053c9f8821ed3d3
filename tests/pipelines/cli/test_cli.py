"""The command line, as a person uses it: real processes, exit codes, one message."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tuneline.errors import OutputExistsError
from tuneline.pipelines.catalog import RECIPES_DIR, shipped_recipes
from tuneline.pipelines.cli import checks, cluster, main, run
from tuneline.pipelines.compiled_file import check_output
from tuneline.pipelines.local.run_dir import LocalRun
from tuneline.version import VERSION


def tuneline(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuneline.pipelines.cli.main", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_schema_is_the_recipes(tmp_path: Path) -> None:
    done = tuneline("schema", cwd=tmp_path)
    schema = json.loads(done.stdout)
    assert schema["required"] == ["name", "base_model", "publish_to"]
    assert schema["$defs"]["LoraConfig"]["properties"]["r"]["description"].startswith("Rank of")


def test_recipes_lists_what_is_shipped(tmp_path: Path) -> None:
    done = tuneline("recipes", cwd=tmp_path)
    for name in ("demo", "llama3-8b-instruct", "qwen2.5-7b-korean", "mistral-7b-dpo", "domain-cpt"):
        assert name in done.stdout


def test_every_command_is_in_a_panel_of_the_help() -> None:
    commands = typer.main.get_command(main.app).commands
    assert len(commands) >= 16
    without = [name for name, command in commands.items() if not command.rich_help_panel]
    assert without == []
    assert {command.rich_help_panel for command in commands.values()} == {
        module.PANEL for module in (run, checks, cluster)
    }


LOCAL = ("--set", "placement.registry=local")
MISTAKES = [
    (("compile", "nonsense"), "no recipe 'nonsense': give a YAML file, or one of demo"),
    (("compile", "demo", "--set", "train.lr=1"), "train.lr: unknown key"),
    (("compile", "demo", "--set", "train.max_steps"), "write KEY=VALUE"),
    (
        ("compile", "demo", "--set", "publish_to=model-registry:x"),
        "error: --set publish_to=model-registry:x: publish_to: publish_to names model-registry:x",
    ),
    (("compile", "demo", "--set", "train.max_steps=["), "the value is not YAML"),
    (
        ("compile", "demo", "-o", "absent/x.yaml"),
        "the directory absent does not exist: create it first",
    ),
    (("compile", "demo", "-o", "x.txt"), "name a file that ends in .yaml"),
    (("compile",), "name a recipe, e.g. tuneline compile demo, or a step with --component"),
    (("compile", "--component", "tarin"), "no component 'tarin': name one of plan, look-up-mod"),
    (("compile", "--component", "train", "--set", "name=x"), "--set changes a recipe: name one"),
    (("compile", "--component", "train", "--resources", "ns"), "--resources writes a pipeline"),
    (("compile", "file"), "file contains one value, 'text', but a recipe is a mapping of keys"),
    (("compile", "."), "error: . is a directory: give the file of a recipe"),
    (("compile", "demo", "-o", "file.yaml"), "file.yaml exists and is not a compiled pipeline"),
    (("report", "."), "is not a run"),
    (("lint", "absent.yaml"), "cannot read absent.yaml: No such file"),
    (("verify", "absent"), "absent is not a directory"),
    (("plan", "demo", "--parameters", "-5"), "greater than or equal to"),
    (("plan", "demo", "--profile", "x"), "--profile x is unknown: choose one of local, small, t4"),
    (("plan", "demo", "--profile", "t4", "--set", "train.kernels=fp8"), "t4 has 7.5: set kernels"),
    (
        ("compile", "demo", "--set", "train.kernels=fp8", "--set", "placement.profile=a10g"),
        "the GPU of placement.profile a10g has 8.6: set kernels to auto",
    ),
    (("plan", "demo", "--cluster"), "no Kubernetes cluster: there is no"),
    (("doctor", "a-run"), "no host: give --host URL or set KFP_ENDPOINT"),
    (("status", "nope"), "there is no local run nope (`tuneline runs` lists them), and for one on"),
    (("compare", "nope"), "1 run is named: name 2 to 4"),
    (("init", "absent.csv"), "there is no file or directory absent.csv"),
    (("init", "rows", "--profile", "x"), "--profile x is unknown: choose one of t4, a10g"),
    (("init", "rows", "--columns", "q"), "--columns q: write OURS=YOURS, e.g. --columns prompt="),
    (("recipes", "demo", "--data", "x.txt"), "name a file that ends in .csv or .jsonl"),
    (
        ("recipes", "domain-cpt", "--data", "x.csv"),
        "--data needs a recipe whose rows are generated",
    ),
    (("recipes", "nope"), "no shipped recipe 'nope': choose one of demo"),
    (("resume", "nope", "--set", "a=b"), "--set needs a local run"),
    (("submit", "demo", *LOCAL), "no host: give --host URL or set KFP_ENDPOINT"),
    (("schedule", "demo"), "give one of --cron and --every"),
    (("nonsense",), "No such command 'nonsense'"),
]
REFUSALS = [
    (("run", "demo", "--runner", "docker"), "no container engine answers"),
    (("run", "demo", "--runs-dir", "file"), "Not a directory"),
    (("submit", "demo", *LOCAL, "--host", "http://127.0.0.1:1"), "cannot be reached at http://127"),
]


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [*((*each, 2) for each in MISTAKES), *((*each, 1) for each in REFUSALS)],
)
def test_what_goes_wrong_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    says: str,
    code: int,
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "file.yaml").write_text("name: mine")
    monkeypatch.chdir(tmp_path)
    # Nobody's cluster, engine or session.
    for name in ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/absent.sock")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["tuneline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


def test_a_mistake_is_one_message_in_a_shell_too(tmp_path: Path) -> None:
    done = tuneline("compile", "nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe 'nonsense'")


def commands_of(panel: str, text: str) -> list[str]:
    """Return the commands that a help panel lists, in order."""
    rows = text.partition(f" {panel} ")[2].partition("\u2570")[0].splitlines()[1:]
    return [row[2:].split()[0] for row in rows if row[2:3].isalpha()]


def test_the_help_has_a_panel_for_each_kind_of_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(main.app, ["--help"]).output
    assert commands_of("Recipes and local runs", text) == [
        "init", "run", "report", "runs", "chat", "compare", "recipes", "compile", "schema",
    ]  # fmt: skip
    assert commands_of("Checks", text) == ["plan", "lint", "verify"]
    assert commands_of("Runs on a cluster", text) == [
        "submit", "schedule", "schedules", "status", "logs", "cancel", "resume", "serve", "doctor",
    ]  # fmt: skip
    assert "--install-completion" in text


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tuneline run de", ["demo"]),
        ("tuneline plan ", [path.stem for path in shipped_recipes()]),
        # None fits: the shell goes on with file names.
        ("tuneline submit ./de", []),
        ("tuneline sched", ["schedule", "schedules"]),
    ],
)
def test_the_shell_completes_commands_and_recipes(typed: str, offered: list[str]) -> None:
    asked = {"_TUNELINE_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    asked["COMP_CWORD"] = str(len(typed.split(" ")) - 1)
    # As the installed script: the variable is named after it.
    script = "import sys; from tuneline.pipelines.cli.main import main; sys.argv[0] = 'tuneline'"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; main()"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == offered, done.stderr


def test_the_version(tmp_path: Path) -> None:
    assert tuneline("--version", cwd=tmp_path).stdout == f"tuneline {VERSION}\n"


def test_compile_writes_the_pipeline_beside_the_recipe_and_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    recipe = tmp_path / "mine" / "demo.yaml"
    recipe.write_text((RECIPES_DIR / "demo.yaml").read_text())
    done = tuneline("compile", "mine/demo.yaml", cwd=tmp_path)
    written = tmp_path / "mine" / "demo.pipeline.yaml"
    assert done.returncode == 0 and f"wrote {written}" in done.stdout, done.stderr
    pipeline = next(yaml.safe_load_all(written.read_text()))
    assert pipeline["pipelineInfo"]["name"] == "tuneline-demo"
    for path in (written, recipe):
        kept = path.read_text()
        check = OutputExistsError if path is recipe else None
        with pytest.raises(check) if check else contextlib.nullcontext():
            check_output(path)
        assert path.read_text() == kept
    assert recipe.read_text() == (RECIPES_DIR / "demo.yaml").read_text()
    refused = tuneline("run", str(written), cwd=tmp_path)
    assert refused.returncode == 2 and "is a compiled pipeline: give the recipe" in refused.stderr


def test_a_run_that_fails_names_the_step_and_keeps_a_report(tmp_path: Path) -> None:
    # The rows beyond those that are looked at first: prepare finds them.
    rows = "".join(f"Q{n},A{n}\n" for n in range(100)) + "".join(f"Q{n},\n" for n in range(50))
    (tmp_path / "rows.csv").write_text(f"prompt,completion\n{rows}")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbase_model: builtin:smollm2-135m\ndataset: rows.csv\npublish_to: dir:out\n"
        "evaluate: {tasks: [heldout_perplexity]}\n"
    )
    done = tuneline("run", "mine.yaml", "--runs-dir", "r", cwd=tmp_path)
    assert done.returncode == 1
    assert "step prepare failed" in done.stderr and "rows.csv cannot be used" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    run_dir = next(path for path in (tmp_path / "r").iterdir() if path.name.startswith("mine-"))
    assert f"kept: fetch\ncontinue: tuneline resume r/{run_dir.name}" in done.stderr
    assert "rows.csv" in (run_dir / "report.html").read_text()
    summary = next(run_dir.glob("artifacts/*/diagnose/summary"))
    assert "prepare" in summary.read_text()

    for command, says in (
        ("status", r"prepare +failed"),
        ("doctor", r"prepare: DataError\n  why: "),
        ("logs", "rows.csv cannot be used"),
    ):
        shown = tuneline(command, str(run_dir), *(["prepare"] * (command == "logs")), cwd=tmp_path)
        assert shown.returncode == 0 and re.search(says, shown.stdout), shown

    # With other settings, the finished steps are kept and the failed one goes on.
    again = tuneline(
        *("resume", str(run_dir), "--set", "prepare.max_rows=50", "--set", "train.lora.r=0"),
        cwd=tmp_path,
    )
    assert again.returncode == 2 and "train.lora.r is 0, but must be" in again.stderr


def processes_of(text: str) -> list[str]:
    """Return the ids of live processes with a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue  # It ended meanwhile.
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_process(tmp_path: Path, stop: signal.Signals) -> None:
    # Fetch converts the embedded model for seconds, so it is at work when the signal comes.
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneline.pipelines.cli.main", "run", "demo"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(
        '"fetch", "event": "started"' in path.read_text()
        for path in tmp_path.glob("runs/*/artifacts/events.jsonl")
    ):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "no step began"
        time.sleep(0.1)
    process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[stop]
    (run_dir,) = tmp_path.glob("runs/demo-*")
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[stop]
    assert f"stopped by {name}\nat step: fetch\nkept: no results yet\n" in said
    assert f"continue: tuneline resume runs/{run_dir.name}" in said
    assert LocalRun(run_dir).state() == "stopped"
    while left := processes_of(str(tmp_path)):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
