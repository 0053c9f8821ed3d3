"""The page of a run shows what its records say."""

import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    RunHeader,
    RunSummary,
    TrainingPoint,
    TrainingSummary,
    write_jsonl,
)
from tuneline.errors import OutputExistsError, WorldError
from tuneline.quantize.config import QuantizeConfig
from tuneline.recipe import Recipe
from tuneline.report.run import run
from tuneline.train.config import LoraConfig, TrainConfig


def cards(page: str) -> dict[str, str]:
    """Return heading -> the card's visible text."""
    found = {}
    for card in re.findall(r'<section class="card">(.*?)</section>', page, re.S):
        heading = re.search(r"<h2>(.*?)</h2>", card).group(1)
        # The narrow drawing repeats the wide one, titles are for pointers and screen readers.
        card = re.sub(r'<svg class="down".*?</svg>|<title>.*?</title>|<desc>.*?</desc>', "", card)
        found[heading] = " ".join(unescape(re.sub(r"<[^>]+>", " ", card)).split())
    return found


def write_page(recipe: Recipe, run_dirs: dict) -> tuple[str, RunSummary]:
    summary = run(RunHeader.parse(recipe.model_dump_json()), **run_dirs)
    return Path(run_dirs["page_path"]).read_text(encoding="utf-8"), summary


def test_the_page_shows_the_records(recipe: Recipe, run_dirs: dict) -> None:
    page, _ = write_page(recipe, run_dirs)
    shown = cards(page)
    assert list(shown) == [
        "Is it safe to use?",
        "Steps of the run",
        "Scores before and after training",
        "Answers before and after training",
        "Training",
        "Data",
        "Merge and exports",
        "Which export to use",
        "Provenance",
    ]
    for name, text in [
        ("Is it safe to use?", "heldout_exact 0.02 \u2192 0 (no clear change)"),
        (
            "Is it safe to use?",
            "heldout_perplexity 9.81 \u2192 1.34 (better). With 95 % confidence",
        ),
        ("Is it safe to use?", "at 99.7 % of the positions"),
        ("Is it safe to use?", "4 of 40 questions of boolq"),
        ("Is it safe to use?", "State of the run tuneline status RUN"),
        ("Is it safe to use?", "Publishes to dir:published"),
        ("Is it safe to use?", "q8_0 : llama.cpp and Ollama"),
        ("Steps of the run", "train 3 min 02 s 60 steps"),
        ("Steps of the run", "quantize 1 min 10 s 5 exports"),
        ("Steps of the run", "publish next"),
        (
            "Scores before and after training",
            "heldout_choice target acc 0.310 0.870 +0.56 [+0.485, +0.63] 200",
        ),
        (
            "Scores before and after training",
            "heldout_exact guard acc 0.02 0 -0.02 [-0.045, +0.01] 200 undecided",
        ),
        ("Answers before and after training", "base 0 of 5, tuned 4 of 5"),
        ("Answers before and after training", "524288 512 * 1000 = 512000 524,288"),
        ("Answers before and after training", "Yes, 250m is more than 0.3 <b>bold</b>"),
        ("Training", "4.88 M of 139 M (3.5 %)"),
        (
            "Scores before and after training",
            "heldout_perplexity guard perplexity 9.81 1.34 -8.47 [-9.1, -7.9]",
        ),
        ("Training", "Evaluation loss before training, base in 4 bits 2.412"),
        ("Training", "Last training loss 0.2345"),
        ("Training", "Evaluation loss above training loss +0.0321"),
        (
            "Training",
            "Device hours 0.05 Energy of the GPUs 0.0123 kWh Cost (at price_per_hour) 0.175",
        ),
        ("Data", "1,140, 60, 200"),
        ("Data", "Rejected rows 3 (0.2 %)"),
        ("Data", "Rows left out as like one held out or evaluated 2"),
        ("Data", "Questions of boolq in the training rows 4 of 40"),
        ("Data", "9,876 (answers)"),
        ("Data", "256 (recommended 80)"),
        ("Merge and exports", "0.00031 nats (at most 0.01)"),
        ("Merge and exports", "Same most likely token 99.7 %"),
        (
            "Merge and exports",
            "q4_k_m 105 MB 6.17 differs from the merged model after 3 characters",
        ),
        ("Merge and exports", "gptq-4bit 131 MB 4.28 loads and answers groups of 64 58 s"),
        ("Merge and exports", "group_size 128 does not divide 576, took 64"),
        ("Which export to use", "q8_0 145 MB 8.50 0.0069 97.7 % 1.415 66.1 llama.cpp and Ollama"),
        ("Which export to use", "f16 271 MB 16.00 3e-06 100.0 % 1.412 45.2 closest"),
        ("Which export to use", "75.9 least memory fastest on a CPU"),
        ("Which export to use", "1.533 70.3 q4_k_m is smaller and closer"),
        ("Provenance", "base model: same hash dataset: same hash"),
    ]:
        assert text in shown[name]
    lead = page[: page.index("Steps of the run</h2>")]
    assert "acc rose from 0.310 to 0.870 on 200 unseen questions, by at least 0.485" in lead
    assert "0.17" in lead and "0.0123 kWh, 0.05 device hours" in lead
    assert "The step publish uploads it to dir:published." in lead
    assert "5 min 27 s" in lead  # 11.4+4.2+21.3+181.7+14.9+22.9+0.4 and 4*3.1+58


def test_the_page_loads_nothing_and_is_well_formed(recipe: Recipe, run_dirs: dict) -> None:
    page, _ = write_page(recipe, run_dirs)
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|\s(src|href)=", page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                opened.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(page)
    assert opened == []


def test_the_recipe_on_the_page_is_the_recipe(recipe: Recipe, run_dirs: dict) -> None:
    page, _ = write_page(recipe, run_dirs)
    text = unescape(re.search(r"<pre>(.*?)</pre>", page, re.S).group(1))
    assert Recipe.parse(yaml.safe_load(text)) == recipe


def test_the_summary_is_the_decision_and_the_exports(recipe: Recipe, run_dirs: dict) -> None:
    _, summary = write_page(recipe, run_dirs)
    read = RunSummary.read(run_dirs["summary_dir"])
    decision = Decision.read(run_dirs["decision_dir"])
    assert (read.recipe, read.verdict, read.reason) == ("demo", "promote", decision.reason)
    assert read.comparisons == decision.comparisons
    formats = ["f16", "q8_0", "q5_k_m", "q4_k_m", "gptq-4bit"]
    assert [export.format for export in read.exports] == formats
    assert read.exports == summary.exports


def test_a_held_model_is_not_shown_as_published(recipe: Recipe, run_dirs: dict) -> None:
    path = Path(run_dirs["decision_dir"])
    decision = Decision.read(path)
    decision.model_copy(update={"verdict": "hold", "reason": "no task got better"}).write(path)
    page, summary = write_page(recipe, run_dirs)
    assert summary.verdict == "hold"
    assert 'class="banner warn"' in page and "Nothing was published to dir:published." in page
    assert "publish skipped on hold" in cards(page)["Steps of the run"]


def test_a_run_without_exports(recipe: Recipe, run_dirs: dict) -> None:
    recipe = recipe.model_copy(update={"quantize": QuantizeConfig(gguf=(), gptq=())})
    page, summary = write_page(recipe, {**run_dirs, "exports_dirs": []})
    assert summary.exports == []
    assert "The recipe asks for no exports." in cards(page)["Merge and exports"]
    assert "quantize skipped" in cards(page)["Steps of the run"]


def test_fewer_exports_than_the_recipe_asks_for_are_refused(recipe: Recipe, run_dirs: dict) -> None:
    with pytest.raises(WorldError, match=r"asks for 5 .* did not get q8_0, q5_k_m, q4_k_m, gptq"):
        write_page(recipe, {**run_dirs, "exports_dirs": run_dirs["exports_dirs"][:1]})
    assert not Path(run_dirs["page_path"]).exists()


RECORDS = (
    ("base_model_dir", ModelOrigin),
    ("dataset_dir", DatasetManifest),
    ("adapter_dir", TrainingSummary),
    ("merged_dir", MergeProof),
)


def test_the_records_alone_give_the_same_page(
    recipe: Recipe, run_dirs: dict, tmp_path: Path
) -> None:
    whole, _ = write_page(recipe, run_dirs)
    alone = dict(run_dirs)
    for name, record in RECORDS:
        alone[name] = str(tmp_path / f"{name}.record")
        record.read(run_dirs[name]).copy_to(alone[name], directory=run_dirs[name])
    alone["exports_dirs"] = []
    for number, path in enumerate(run_dirs["exports_dirs"]):
        alone["exports_dirs"].append(str(tmp_path / f"export-{number}.record"))
        QuantizedModel.read(path).copy_to(alone["exports_dirs"][-1], directory=path)
    alone |= {"page_path": str(tmp_path / "page-2"), "summary_dir": str(tmp_path / "summary-2")}
    # The pages state when they were written, and their own hash.
    pages = [whole, write_page(recipe, alone)[0]]
    pages = [re.sub(r"Finished [\d: -]+ UTC|<!-- .* -->", "", page) for page in pages]
    assert pages[0] == pages[1]


def test_a_run_without_generations(recipe: Recipe, run_dirs: dict) -> None:
    for side in ("base", "tuned"):
        Path(run_dirs[f"{side}_scores_dir"], "generations.jsonl").write_text("")
    page, _ = write_page(recipe, run_dirs)
    assert "Answers before and after training" not in cards(page)


def test_another_base_than_the_adapters_is_shown(recipe: Recipe, run_dirs: dict) -> None:
    origin = ModelOrigin.read(run_dirs["base_model_dir"])
    origin.model_copy(update={"sha256": "0" * 64}).write(run_dirs["base_model_dir"])
    page, _ = write_page(recipe, run_dirs)
    assert "base model: another hash, 5f0c5f0c5f0c" in cards(page)["Provenance"]


def test_the_page_shows_what_was_trained_not_what_the_recipe_says(
    recipe: Recipe, run_dirs: dict
) -> None:
    """As after a start from KFP's UI with another train_config, dataset and publish_to."""
    adapter = run_dirs["adapter_dir"]
    config = TrainConfig(lora=LoraConfig(r=64), seed=1)
    TrainingSummary.read(adapter).write(adapter, config)
    dataset = DatasetManifest.read(run_dirs["dataset_dir"])
    source = "https://someone:hunter22@host/rows.jsonl"
    dataset.model_copy(update={"source": source}).write(run_dirs["dataset_dir"])
    run_dirs |= {"target": "org/another", "publish_config": '{"private": false}'}
    page, summary = write_page(recipe, run_dirs)
    shown = yaml.safe_load(unescape(re.search("<pre>(.*?)</pre>", page, re.S)[1]))
    assert (shown["train"]["lora"]["r"], shown["train"]["seed"]) == (64, 1)
    assert shown["dataset"] == "https://[redacted]@host/rows.jsonl"
    assert (shown["publish_to"], shown["publish"]["private"]) == ("org/another", False)
    assert summary.differs_from_recipe == [
        "dataset was https://[redacted]@host/rows.jsonl, the recipe has builtin:kubernetes-"
        "quantities",
        "publish_to was org/another, the recipe has dir:published",
        "train.lora.r was 64, the recipe has 16",
        "train.seed was 1, the recipe has 3407",
        "publish.private was false, the recipe has null",
    ]
    assert "Other values than the recipe" in page and "train.lora.r was 64" in page
    assert "uploads it to org/another." in page and "hunter22" not in page


def test_the_formats_of_the_run_count(recipe: Recipe, run_dirs: dict) -> None:
    """As after a start from KFP's UI with other formats."""
    dirs = run_dirs["exports_dirs"]
    kept = QuantizedModel.read(dirs[0])
    section = {"gguf": [], "gptq": [], kept.kind: [kept.format]}
    run_dirs |= {"exports_dirs": dirs[:1], "publish_config": "{}"}
    with pytest.raises(WorldError, match="but this step did not get"):
        write_page(recipe, run_dirs)
    _, summary = write_page(recipe, run_dirs | {"quantize_config": json.dumps(section)})
    assert [export.format for export in summary.exports] == [kept.format]


def test_text_of_others_is_no_html(recipe: Recipe, run_dirs: dict) -> None:
    evil = "<img src=x onerror=alert(1)>\"'</pre></section><script>"
    changes = {
        "base_model_dir": (ModelOrigin, {"source": evil, "licence": evil, "architecture": evil}),
        "dataset_dir": (DatasetManifest, {"source": evil, "licence": evil, "template": evil}),
        "adapter_dir": (TrainingSummary, {"device": evil, "fitted": evil}),
        "decision_dir": (Decision, {"reason": evil}),
    }
    for name, (kind, fields) in changes.items():
        kind.read(run_dirs[name]).model_copy(update=fields).write(run_dirs[name])
    for path in run_dirs["exports_dirs"]:
        fields = {"generated": evil, "reference": evil, "notes": [evil]}
        QuantizedModel.read(path).model_copy(update=fields).write(path)
    answers = [{"question": evil, "prompt": evil, "answer": evil, "text": evil}]
    for side in ("base", "tuned"):
        write_jsonl(Path(run_dirs[f"{side}_scores_dir"], "generations.jsonl"), answers)
    hostile = recipe.model_copy(update={"description": evil})
    page, _ = write_page(hostile, run_dirs | {"target": f"dir:{evil}"})
    assert "onerror" in page and "<img" not in page and "<script" not in page


def test_a_run_with_its_recipes_values_has_no_remark(recipe: Recipe, run_dirs: dict) -> None:
    run_dirs |= {"publish_config": "{}"}
    page, summary = write_page(recipe, run_dirs)
    assert summary.differs_from_recipe == [] and "Other values than" not in page


def test_an_unfinished_artifact_is_named(recipe: Recipe, run_dirs: dict) -> None:
    Path(run_dirs["merged_dir"], "merge.json").unlink()
    with pytest.raises(WorldError, match="has no merge.json: the step that makes it"):
        write_page(recipe, run_dirs)
    assert not Path(run_dirs["page_path"]).exists()


def test_a_summary_is_not_overwritten(recipe: Recipe, run_dirs: dict) -> None:
    write_page(recipe, run_dirs)
    with pytest.raises(OutputExistsError, match="summary exists and is not empty"):
        write_page(recipe, run_dirs)


def test_from_the_command_line(recipe: Recipe, run_dirs: dict, tmp_path: Path) -> None:
    config = tmp_path / "recipe.json"
    config.write_text(recipe.model_dump_json())
    arguments = ["--config", str(config)]
    for name, value in run_dirs.items():
        flag = re.sub(r"_(dirs?|path)$", "", name).replace("_", "-")
        arguments += [f"--{flag}", *(value if isinstance(value, list) else [value])]
    subprocess.run([sys.executable, "-m", "tuneline.report", *arguments], check=True)
    written = json.loads(Path(run_dirs["summary_dir"], "summary.json").read_text())
    assert written["recipe"] == "demo"


def test_all_that_report_reads_is_small_whatever_the_model(
    recipe: Recipe, run_dirs: dict, tmp_path: Path
) -> None:
    """A pod of report has 512 MiB of disk, of which KFP's and Argo's own files take 300."""
    hashes = {f"model-{n:05d}-of-01000.safetensors": "a" * 64 for n in range(1000)}
    point = TrainingPoint(
        step=100_000, epoch=1.23456789012345, loss=1.23456789012345, eval_loss=1.23456789012345,
        learning_rate=1.23456789e-05, grad_norm=1.23456789012345,
    )  # fmt: skip
    sizes = {}
    records = [(run_dirs[name], record) for name, record in RECORDS]
    # Four exports of a model in 1,000 files, after 20,000 logged steps.
    records += [(path, QuantizedModel) for path in run_dirs["exports_dirs"][:4]]
    for number, (directory, record) in enumerate(records):
        read = record.read(directory)
        changes = {"files": hashes} | (
            {"history": [point] * 20_000} if isinstance(read, TrainingSummary) else {}
        )
        Path(directory, record.filename).write_text(
            read.model_copy(update=changes).model_dump_json(indent=2)
        )
        copy = tmp_path / f"record-{number}"
        read.copy_to(copy, directory=directory)
        sizes[record.role, number] = copy.stat().st_size
    for side in ("base", "tuned"):
        scores = Path(run_dirs[f"{side}_scores_dir"])
        (scores / "samples").mkdir()
        rows = [
            {"id": f"{n:064d}", "score": 0.123456789012345, "weight": 100} for n in range(20_000)
        ]
        write_jsonl(scores / "samples" / "task.jsonl", rows)
        sizes[side, 0] = sum(path.stat().st_size for path in scores.rglob("*") if path.is_file())
    assert len(sizes) == 10
    assert sum(sizes.values()) < 20 << 20


def test_the_page_has_the_remarks_of_the_gate(recipe: Recipe, run_dirs: dict) -> None:
    decision = Path(run_dirs["decision_dir"])
    record = Decision.read(decision)
    prompted = record.comparisons[0].model_copy(update={"role": "prompted", "num_examples": 8})
    record.model_copy(
        update={
            "remarks": ["4 models were measured <b>here</b>"],
            "comparisons": [*record.comparisons, prompted],
        }
    ).write(decision)
    summary = run(RunHeader.parse(recipe.model_dump_json()), **run_dirs)
    assert summary.remarks == ["4 models were measured <b>here</b>"]
    page = Path(run_dirs["page_path"]).read_text()
    assert "4 models were measured &lt;b&gt;here&lt;/b&gt;." in page
    assert "heldout_choice, base model with 8 training rows in its prompt" in page
    assert "heldout_choice (prompted)" in page
