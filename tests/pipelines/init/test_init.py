"""A recipe is written for rows of many kinds, and prepare takes it as it stands."""

import csv
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuneline.artifacts import DatasetManifest
from tuneline.errors import DataError, OutputExistsError, RecipeError, UserError
from tuneline.evaluate.config import EvaluateConfig
from tuneline.pipelines.init.machine import Machine
from tuneline.pipelines.init.rows import look
from tuneline.pipelines.init.write import Proposed, init, output_for
from tuneline.pipelines.plan.early import check_early
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.run import run as prepare
from tuneline.prepare.tokens.tokenizer import load_tokenizer
from tuneline.recipe import Recipe, load_recipe

LAPTOP = Machine(num_cpus=2)
QUESTIONS = [
    {
        "질문": f"주문 {number} 언제 오나요?" if number % 2 else f"When does {number} arrive?",
        "답변": f"주문 {number} 내일 도착합니다." if number % 2 else f"{number} comes tomorrow.",
    }
    for number in range(1000, 1120)
]
TOOLS = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "Where is it?"},
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "track", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "in transit"},
    {"role": "assistant", "content": "On its way."},
]


def write_csv(
    path: Path, rows: list[dict[str, Any]], *, encoding: str = "utf-8", delimiter: str = ","
) -> Path:
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def propose(
    data: Path, base: Path, *, machine: Machine = LAPTOP, **given: Any
) -> tuple[Proposed, Recipe]:
    path = output_for(str(data), None)
    keys = {key.replace("__", "."): value for key, value in given.items()}
    proposed = init(str(data), path, machine, base_model=str(base), given=keys)
    return proposed, load_recipe(path, needs_files=True)


def prepared(recipe: Recipe, base: Path, dataset_dir: Path) -> DatasetManifest:
    return prepare(
        recipe.prepare,
        source=recipe.data,
        base_model_dir=str(base),
        dataset_dir=str(dataset_dir),
        statistics_path=str(dataset_dir.with_suffix(".html")),
    )


@pytest.mark.parametrize(
    ("encoding", "delimiter", "remark"),
    [
        ("utf-8", ",", None),
        ("cp949", ";", "read as CP949"),
        ("utf-16", "\t", "read as UTF-16"),
        ("utf-8-sig", "|", "separated by vertical bars"),
    ],
)
def test_a_csv_of_any_make_becomes_a_recipe_that_prepare_takes(
    tiny_model_dir: Path, tmp_path: Path, encoding: str, delimiter: str, remark: str | None
) -> None:
    data = write_csv(tmp_path / "내 문의.csv", QUESTIONS, encoding=encoding, delimiter=delimiter)
    proposed, recipe = propose(data, tiny_model_dir)
    assert recipe.base_model == str(tiny_model_dir)
    assert proposed.path == tmp_path / "my-model.yaml"
    assert (recipe.prepare.method, recipe.prepare.format) == ("sft", "prompt-completion")
    assert recipe.prepare.columns == {"prompt": "질문", "completion": "답변"}
    said = "\n".join(proposed.sentences())
    assert "120 rows" in said and "Latin 50%, Hangul (Korean) 50%" in said
    assert remark is None or remark in said
    done = prepared(recipe, tiny_model_dir, tmp_path / "dataset")
    assert done.num_rejected_rows == 0 and done.truncated_token_share == 0
    assert done.num_heldout_rows == 24  # a fifth
    # The length that init measured with the model's tokenizer is that of prepare.
    assert recipe.prepare.max_seq_length == done.recommended_max_seq_length


def test_the_report_shows_whole_answers(tiny_model_dir: Path, tmp_path: Path) -> None:
    longer = [
        row | {"답변": f"죄송합니다. {row['답변']} 늦어지면 알려 드립니다."} for row in QUESTIONS
    ]
    _, recipe = propose(write_csv(tmp_path / "a.csv", longer), tiny_model_dir)
    tokenizer, _ = load_tokenizer(str(tiny_model_dir))
    lengths = sorted(len(tokenizer.encode(row["답변"])) for row in longer)
    assert EvaluateConfig().max_new_tokens < lengths[-2] <= recipe.evaluate.max_new_tokens
    _, short = propose(write_csv(tmp_path / "b.csv", QUESTIONS), tiny_model_dir)
    assert short.evaluate.max_new_tokens == EvaluateConfig().max_new_tokens


def test_each_kind_of_rows_gets_its_method_and_a_benchmark_that_fits(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    numbers = range(60)
    pairs = [
        {"prompt": f"Say {n}", "chosen": f"{n}, of course.", "rejected": f"No {n}."}
        for n in numbers
    ]
    judged = [
        {"prompt": f"Say {n}", "completion": f"{n}, if you like.", "label": n % 2 == 0}
        for n in numbers
    ]
    choices = [
        {"prompt": f"{n} + 1?", "completion": f"{n + 1}", "choices": [f"{n + 1}", f"{n}"]}
        for n in numbers
    ]
    pages = tmp_path / "pages"
    pages.mkdir()
    for n in numbers:
        (pages / f"{n}.md").write_text(f"# Page {n}\n\nThe handbook says {n} about {n * 7}.\n")
    found = {}
    for name, data in (
        ("dpo", write_lines(tmp_path / "pairs.jsonl", pairs)),
        ("kto", write_lines(tmp_path / "judged.jsonl", judged)),
        ("sft", write_lines(tmp_path / "choices.jsonl", choices)),
        ("cpt", pages),
    ):
        _, recipe = propose(data, tiny_model_dir)
        assert recipe.prepare.method == name
        early = check_early(recipe, is_local=True)
        assert [check for check in early if check.verdict == "fail"] == []
        found[name] = recipe.gate.target_tasks
        prepared(recipe, tiny_model_dir, tmp_path / f"dataset-{name}")
    assert found == {
        "dpo": ("heldout_choice",),
        "kto": ("heldout_perplexity",),
        "sft": ("heldout_choice",),
        "cpt": ("heldout_perplexity",),
    }
    assert (tmp_path / "pages.yaml").is_file()  # beside the directory


def test_rows_with_tools_are_conversations_and_need_a_template_that_shows_tools(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "calls.jsonl", [{"messages": CALLS, "tools": TOOLS}] * 20)
    rows = look(str(data), PrepareConfig())
    assert rows.proposal.format == "messages"
    assert rows.examples[0].tools == TOOLS
    with pytest.raises(DataError, match="knows no tools.* Name another model with --base, e.g. Q"):
        propose(data, tiny_model_dir)
    assert not (tmp_path / "calls.yaml").exists()


def test_rows_that_cannot_be_used_are_told_and_do_not_stop_the_run(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = [dict(row) for row in [*QUESTIONS, QUESTIONS[0]]]
    for row in rows[3:9]:
        row["답변"] = ""
    rows[20]["질문"] = rows[21]["질문"]
    data = write_csv(tmp_path / "gaps.csv", rows)
    proposed, recipe = propose(data, tiny_model_dir)
    said = "\n".join(proposed.sentences())
    unusable = "gaps.csv line 5 and 5 more: completion (답변) is empty"
    assert f"6 of 121 rows cannot be used: {unusable}" in said
    assert "1 row is equal to an earlier row" in said
    assert "1 row has the question of an earlier row, but another answer" in said
    assert "24 of the rows will be held out" not in said and "23 of the rows will" in said
    done = prepared(recipe, tiny_model_dir, tmp_path / "dataset")
    assert done.num_rejected_rows == 6
    for row in rows[:60]:
        row["답변"] = ""
    with pytest.raises(DataError, match="60 of 121 rows of .*, read as prompt-completion, cannot"):
        propose(write_csv(tmp_path / "holes.csv", rows), tiny_model_dir)


def test_what_the_user_sets_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"q": "Which one?", "a": f"number {n}", "b": f"not {n}"} for n in range(30)]
    data = write_csv(tmp_path / "three.csv", rows)
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    _, recipe = propose(
        data,
        tiny_model_dir,
        prepare__columns=columns,
        prepare__heldout={"max_rows": 5},
        train__dpo__beta=0.3,
        train__max_steps=7,
        publish_to="my-org/three",
        name="other",
    )
    assert recipe.prepare.method == "dpo" and recipe.prepare.columns == columns
    assert recipe.prepare.heldout.max_rows == 5 and recipe.train.dpo.beta == 0.3
    assert (recipe.train.max_steps, recipe.publish_to, recipe.name) == (7, "my-org/three", "other")
    text = (tmp_path / "three.yaml").read_text()
    assert text.count("given with --set") == 6
    with pytest.raises(RecipeError, match="train.max_step: unknown key"):
        propose(write_csv(tmp_path / "four.csv", rows), tiny_model_dir, train__max_step=7)
    assert not (tmp_path / "four.yaml").exists()


def test_a_gpu_gets_its_profile_and_the_exports_for_gpu_servers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    gpu = Machine(16, "NVIDIA H100 80GB HBM3", 1, 79.6)
    _, recipe = propose(write_csv(tmp_path / "rows.csv", QUESTIONS), tiny_model_dir, machine=gpu)
    assert (recipe.placement.profile, recipe.placement.num_accelerators) == ("h100", 1)
    assert recipe.quantize.gptq == ("gptq-4bit",) and recipe.train.learning_rate == "auto"
    unknown = Machine(16, "NVIDIA GeForce RTX 4090", 1, 24.0)
    assert unknown.profile is None


def test_a_recipe_is_beside_its_data_and_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "handbook" / "pages").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "handbook")
    for source, expected in (
        ("pages", "pages.yaml"),
        ("pages/", "pages.yaml"),
        (".", str(tmp_path / "handbook.yaml")),
        ("openai/gsm8k", "gsm8k.yaml"),
        ("s3://bucket/rows.jsonl.gz", "rows.yaml"),
        ("builtin:support-answers", "support-answers.yaml"),
    ):
        assert output_for(source, None) == Path(expected)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", QUESTIONS)
    (tmp_path / "rows.yaml").write_text("mine")
    with pytest.raises(OutputExistsError, match="rows.yaml exists, and nothing is overwritten"):
        output_for(str(data), None)
    assert output_for(str(data), tmp_path / "other.yml") == tmp_path / "other.yml"
    with pytest.raises(UserError, match="name a file that ends in .yaml"):
        output_for(str(data), tmp_path / "rows.txt")
    with pytest.raises(UserError, match="there is no directory"):
        output_for(str(data), tmp_path / "absent" / "rows.yaml")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    data = write_csv(tmp_path / "few.csv", QUESTIONS[:9])
    with pytest.raises(DataError, match="few.csv has 9 usable rows, but a run needs at least 10"):
        init(str(data), tmp_path / "few.yaml", LAPTOP, base_model=None, given={})


@pytest.mark.slow
def test_without_the_hub_a_gpu_gets_the_embedded_model(tmp_path: Path) -> None:
    """The whole command, with a line as nvidia-smi writes it with --format=csv,noheader,nounits."""
    write_csv(tmp_path / "rows.csv", QUESTIONS)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "tuneline.pipelines.cli.main", "init", "rows.csv"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "machine: 1 x NVIDIA H100 80GB HBM3 with 80 GiB" in done.stdout
    assert "Qwen/Qwen2.5-7B-Instruct would fit the GPU, but it could not be looked" in done.stdout
    assert "at http://127.0.0.1:9: Connect" in done.stdout
    recipe = load_recipe(tmp_path / "rows.yaml", needs_files=True)
    assert recipe.base_model == "builtin:smollm2-135m" and recipe.prepare.template == "chatml"
    assert recipe.placement.profile == "local"
