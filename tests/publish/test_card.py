"""The model cards of what is published."""

import json
import re
from pathlib import Path

import pytest
import yaml
from publish_cases import QUANTIZE, REPOS, publish, recipe_of, to_hub, write_again
from small_records import new_comparison, scored

from tuneline.artifacts import (
    Decision,
    MergeProof,
    Published,
    QuantizedModel,
    RunHeader,
    Scores,
)
from tuneline.gate import GateConfig
from tuneline.html.markdown import escape_markdown
from tuneline.publish.card_parts import BEGIN
from tuneline.report.run import run as write_report
from tuneline.verify import verify


def test_a_card_has_the_description_of_the_recipe(run_dir: Path, tmp_path: Path) -> None:
    said = "Answers questions about tides."
    assert publish(run_dir, f"dir:{tmp_path}/out", "with", description=said).returncode == 0
    assert publish(run_dir, f"dir:{tmp_path}/plain", "without").returncode == 0
    for repo in REPOS:
        name = repo.split("/")[1]
        _, _, body = (tmp_path / "out" / name / "README.md").read_text().split("---\n", 2)
        marker, title, description, _ = body.strip().split("\n\n", 3)
        assert marker == BEGIN
        assert title.startswith(f"# {name}: ") and description == said
        assert said not in (tmp_path / "plain" / name / "README.md").read_text()


def test_the_card(run_dir: Path, tmp_path: Path) -> None:
    assert publish(run_dir, f"dir:{tmp_path}/out", "local").returncode == 0
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "org/base"
    assert matter["license"] == "apache-2.0"
    assert matter["library_name"] == "transformers"
    assert "datasets" not in matter, "a local file is no Hub data set"
    scores = (
        "| heldout_choice | target | acc | 0.2500 | 0.7500 | +0.5000 | [+0.4000, +0.6000] | 200 |"
    )
    assert scores in body
    assert (
        "| q8_0 | 0.0 MB | 8.50 | 6.9e-03 | 97.7% | 1.500 | 79.5% | 62 | "
        'loads and answers "an answer"; same tokens as the tokenizer on 236 texts; '
        "same chat template on 7 conversations; stops at `</s>` |"
    ) in body
    assert (
        '| gptq-4bit | 0.0 MB | 8.50 | - | - | - | - | - | loads and answers "an answer" |' in body
    )
    assert "torch 2" in body and "; seed 3407\n" in body
    assert "hashes of all files: in `tuneline.json`" in body
    assert "heldout_choice on 200 of these rows; the merged model scores 80.0%." in body
    assert "| Last training loss | 0.5 |" in body and "| Adapter | LoRA, r=16, " in body
    curve = body.split("## Training curve")[1].split("##")[0].strip().splitlines()[2:]
    assert curve[0] == "| 0 | - | 2.000 |" and curve[-1] == "| 40 | - | 0.750 |"
    assert len(curve) == 10 and "| 5 | 0.400 | - |" in curve
    gguf = tmp_path / "out" / "mine-gguf"
    assert (gguf / "Modelfile-q8_0").read_text() == (
        'FROM ./mine-q8_0.gguf\nPARAMETER stop "</s>"\n'
    )
    assert (gguf / "mine-q8_0.gguf").is_file()
    assert "ollama create mine -f Modelfile-q8_0" in (gguf / "README.md").read_text()
    assert "2" * 16 in body
    assert "90 training rows" in body
    assert "/home/someone" not in card
    marker = json.loads((tmp_path / "out" / "mine" / "tuneline.json").read_text())
    assert marker["dataset_sha256"] == "2" * 64


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("Llama3.1", {"license": "llama3.1"}),
        # What fetch finds beside `license: other`.
        ("qwen-research", {"license": "other", "license_name": "qwen-research"}),
        ("Our Own, v2", {"license": "other", "license_name": "our-own-v2"}),
        ("other", {"license": "other"}),
        (None, {}),
    ],
)
def test_a_licence_is_named_as_the_hub_takes_it(
    run_dir: Path, hub, licence: str | None, fields: dict[str, str]
) -> None:
    write_again(run_dir, {"base": {"licence": licence}})
    done = to_hub(run_dir, hub, "out")
    assert done.returncode == 0, done.stderr
    for repo in REPOS:
        matter = yaml.safe_load(hub.content(repo, "README.md").decode().split("---\n")[1])
        assert {key: matter[key] for key in matter if key.startswith("license")} == fields


@pytest.mark.parametrize(
    ("source", "hub_ids", "datasets"),
    [
        ("org/rows", ["org/rows"], ["org/rows"]),
        ("org/rows, data/more", ["org/rows"], ["org/rows"]),
        # A directory with the form of a Hub ID.
        ("data/rows", [], None),
        # Records of an older tuneline.
        ("org/rows.v2", None, ["org/rows.v2"]),
        ("data/rows.jsonl", None, None),
    ],
)
def test_a_card_names_a_data_set_of_the_hub(
    run_dir: Path,
    tmp_path: Path,
    source: str,
    hub_ids: list[str] | None,
    datasets: list[str] | None,
) -> None:
    write_again(run_dir, {"dataset": {"source": source, "hub_ids": hub_ids}})
    assert publish(run_dir, f"dir:{tmp_path}/out", "local").returncode == 0
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1]).get("datasets") == datasets


def test_page_card_and_tree_show_the_same_exports(run_dir: Path, tmp_path: Path) -> None:
    for side in ("base", "tuned"):
        (run_dir / f"{side}-scores" / "generations.jsonl").write_text("")
    exports = ["q8_0", "gptq-4bit"]
    page = tmp_path / "page"
    summary = write_report(
        RunHeader.parse(recipe_of().model_dump_json()),
        **{f"{name}_dir": str(run_dir / name) for name in ("dataset", "adapter", "merged")},
        base_model_dir=str(run_dir / "base"),
        base_scores_dir=str(run_dir / "base-scores"),
        tuned_scores_dir=str(run_dir / "tuned-scores"),
        decision_dir=str(run_dir / "decision"),
        exports_dirs=[str(run_dir / name) for name in exports],
        page_path=str(page),
        summary_dir=str(tmp_path / "summary"),
    )
    assert publish(run_dir, f"dir:{tmp_path}/out", "published").returncode == 0
    assert [export.format for export in summary.exports] == exports
    shown = page.read_text().split("Merge and exports")[1].split("<pre>")[0]
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    table = card.split("## Exports")[1].split("\n## ")[0]
    for name in exports:
        assert name in shown and f"| {name} |" in table
    assert (tmp_path / "out" / "mine-gguf" / "mine-q8_0.gguf").is_file()
    assert (tmp_path / "out" / "mine-gptq-4bit" / "config.json").is_file()


def test_every_card_says_how_to_run_all_of_the_family(run_dir: Path, hub) -> None:
    """Own repository first; the adapter on the 4 bits that it was trained on."""
    assert to_hub(run_dir, hub, "out").returncode == 0
    for repo in REPOS:
        body = hub.content(repo, "README.md").decode()
        section = body.split("## How to run it")[1].split("\n## ")[0]
        assert section.strip().split(":")[0].count(f"`{repo}`") == 1, "its own comes first"
        for line in (
            'base = AutoModelForCausalLM.from_pretrained("org/base", '
            f'revision="{"a" * 40}", quantization_config=nf4)',
            'model = PeftModel.from_pretrained(base, "me/mine-lora")',
            'chat = pipeline("text-generation", model="me/mine")',
            "vllm serve me/mine-gptq-4bit",
            "llama-cli -hf me/mine-gguf:Q8_0 -cnv",
            "ollama run hf.co/me/mine-gguf:Q8_0",
        ):
            assert line in section
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(blocks) == 3
        for block in blocks:
            compile(block, repo, "exec")


@pytest.mark.parametrize(
    ("dequantized", "on_the_card", "in_the_code"),
    [
        (False, "weights in bitsandbytes nf4, trained on as it is, licence", None),
        (
            True,
            "weights in bitsandbytes nf4, converted to bfloat16 before training, licence",
            "# Before training, the base model's weights (bitsandbytes nf4) were converted.",
        ),
    ],
)
def test_a_card_says_how_a_quantised_base_was_taken(
    dequantized: bool, on_the_card: str, in_the_code: str | None, run_dir: Path, tmp_path: Path
) -> None:
    changes = {"quantization": "bitsandbytes nf4", "dequantized": dequantized}
    write_again(run_dir, {"base": changes})
    done = publish(run_dir, f"dir:{tmp_path}/out", "local")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "mine-lora" / "README.md").read_text()
    assert on_the_card in card
    assert "quantization_config" not in card and "import torch" not in card
    assert (in_the_code or "") in card


def test_a_card_says_that_experts_in_4_bits_are_not_what_transformers_loads(
    run_dir: Path, tmp_path: Path
) -> None:
    write_again(run_dir, {"adapter": {"experts_quantized": True, "quantized_fraction": 0.97}})
    done = publish(run_dir, f"dir:{tmp_path}/out", "local")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "mine-lora" / "README.md").read_text()
    assert "# The adapter was trained on experts in NF4, which transformers alone does" in card
    assert "quantization_config" not in card
    assert "nf4 (97.0 % of the parameters)" in card


def test_a_card_names_vllm_where_it_serves_the_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    write_again(run_dir, {"gptq-4bit": {"vllm_has_kernel": False}})
    assert publish(run_dir, f"dir:{tmp_path}/out", "local").returncode == 0
    card = (tmp_path / "out" / "mine-gptq-4bit" / "README.md").read_text()
    assert "vllm serve mine\n" in card and "vllm serve mine-gptq" not in card
    assert "GPTQ checkpoint, with transformers (`mine-gptq-4bit`)" in card


@pytest.mark.parametrize(
    ("kind", "packages"), [("awq", "gptqmodel"), ("fp8", "compressed-tensors")]
)
def test_a_checkpoint_of_another_kind(
    kind: str, packages: str, run_dir: Path, tmp_path: Path
) -> None:
    write_again(run_dir, {"gptq-4bit": {"format": kind, "kind": kind}})
    section = json.dumps({"gguf": ["q8_0"], "gptq": [], kind: [kind]})
    done = publish(run_dir, f"dir:{tmp_path}/out", "local", quantize=section)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / f"mine-{kind}"
    assert (folder / "config.json").is_file() and (folder / "serving" / "README.md").is_file()
    card = (folder / "README.md").read_text()
    assert "library_name: transformers" in card
    assert Published.read(run_dir / "local").metadata()[kind].endswith(f"/mine-{kind}")
    assert f"{kind.upper()} checkpoint, with transformers or vLLM (`mine-{kind}`)" in card
    assert f"# needs: pip install {packages}\n" in card and f"vllm serve mine-{kind}\n" in card
    assert f"| {kind} | 0.0 MB |" in card


def test_the_card_has_the_remarks_of_the_gate(run_dir: Path, tmp_path: Path) -> None:
    prompted = new_comparison(role="prompted", num_examples=8)
    changes = {
        "remarks": ["4 models were <b>measured</b>"],
        "comparisons": [new_comparison(), prompted],
    }
    write_again(run_dir, changes={"decision": changes, "merged": {"tuning_kl": 0.01}})
    assert publish(run_dir, f"dir:{tmp_path}/out", "out").returncode == 0
    card = (tmp_path / "out/mine/README.md").read_text()
    assert "\n\n4 models were \\<b\\>measured\\</b\\>\n\n" in card
    assert "| heldout_choice, base model with 8 training rows in its prompt | prompted |" in card
    assert "q8_0 is 0.0069 nats per token from the merged model" in card


def test_an_export_that_the_gate_holds_is_not_published(run_dir: Path, tmp_path: Path) -> None:
    """The card and tuneline.json say which and why; the model and the other exports go on."""
    write_again(run_dir, {"q8_0": scored(200, losses=40)})
    done = publish(run_dir, f"dir:{tmp_path}/out", "published")
    assert done.returncode == 0, done.stderr
    assert "the export q8_0 is held and is not published: heldout_choice -0.200" in done.stderr
    published = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert published == ["mine", "mine-gptq-4bit", "mine-lora"]
    reason = Published.read(run_dir / "published").held_exports["q8_0"]
    assert "answers worse than the merged model by gate.max_regression (0.05) or more" in reason
    for folder in published:
        marker = json.loads((tmp_path / "out" / folder / "tuneline.json").read_text())
        assert marker["held_exports"] == {"q8_0": reason}
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    assert f"- q8_0 is not published: {escape_markdown(reason)}\n- gptq-4bit: its answers" in card
    assert "mine-gguf" not in card
    assert all(found.differences == [] for found in verify(tmp_path / "out"))


def test_an_export_that_the_gate_did_not_see_is_not_published(
    run_dir: Path, tmp_path: Path
) -> None:
    record = QuantizedModel.read(run_dir / "q8_0").model_copy(update={"generated": "other"})
    record.write(run_dir / "q8_0", QUANTIZE, parents=[MergeProof.read(run_dir / "merged")])
    done = publish(run_dir, f"dir:{tmp_path}/out", "published")
    assert done.returncode == 1 and "decision is on another export q8_0" in done.stderr
    decision = Decision.read(run_dir / "decision").model_copy(update={"exports": []})
    scores = [Scores.read(run_dir / f"{side}-scores") for side in ("base", "tuned")]
    decision.write(run_dir / "decision", GateConfig(), parents=scores)
    done = publish(run_dir, f"dir:{tmp_path}/out", "published")
    assert done.returncode == 1
    assert "decision says nothing of the export q8_0. Nothing was published" in done.stderr
    assert not (tmp_path / "out").exists()
