"""What a push leaves alone: people's files, people's words, and what is nobody's business."""

import json
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from publish_cases import REPOS, TOKEN, publish, recipe_of, to_hub, write_again

from tuneline.artifacts import Decision, MergeProof, Published
from tuneline.evaluate.config import EvaluateConfig
from tuneline.merge.config import MergeConfig
from tuneline.placement import PlacementConfig
from tuneline.publish.card_parts import BEGIN, END, CardParts, join_card, split_card
from tuneline.train.config import LoraConfig, TrainConfig
from tuneline.verify import verify


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_and_bundle_state_what_was_trained(run_dir: Path, tmp_path: Path) -> None:
    assert publish(run_dir, f"dir:{tmp_path}/out", "one").returncode == 0
    first = json.loads((tmp_path / "out/mine/tuneline.json").read_text())
    assert first["differs_from_recipe"] == []
    config = TrainConfig(lora=LoraConfig(r=64))
    write_again(run_dir, configs={"adapter": config, "tuned-scores": EvaluateConfig(limit=7)})
    assert publish(run_dir, f"dir:{tmp_path}/out", "two").returncode == 0
    card = (tmp_path / "out/mine/README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"]["lora"]["r"] == 64 and recipe["evaluate"]["limit"] == 7
    assert "train.lora.r was 64, the recipe has 16" in card
    marker = json.loads((tmp_path / "out/mine/tuneline.json").read_text())
    assert marker["recipe_sha256"] != first["recipe_sha256"]
    assert marker["differs_from_recipe"] == [
        "train.lora.r was 64, the recipe has 16",
        "evaluate.limit was 7, the recipe has null",
    ]


def test_a_card_keeps_secrets_prompts_and_cluster_to_itself(run_dir: Path, tmp_path: Path) -> None:
    token = "hf_" + "s" * 34
    train = TrainConfig(sample_prompts=("What did Berta say?",), price_per_hour=2.5, max_cost=40)
    write_again(run_dir, configs={"adapter": train})
    placement = PlacementConfig(registry="registry.internal/team", hub_token_secret="my-secret")
    recipe = recipe_of(f"Made with {token}.", publish_to=f"dir:{tmp_path}/out")
    other = train.model_copy(update={"sample_prompts": ("Berta?",), "seed": 2})
    recipe = recipe.model_copy(
        update={"placement": placement, "train": other, "dataset": "/home/berta/more.jsonl"}
    )
    assert publish(run_dir, f"dir:{tmp_path}/out", "one", recipe=recipe).returncode == 0
    marker = json.loads((tmp_path / "out/mine/tuneline.json").read_text())
    assert marker["differs_from_recipe"] == [
        "dataset was rows.jsonl, the recipe has more.jsonl",
        "train.seed was 3407, the recipe has 2",
    ]
    for path in (tmp_path / "out").rglob("*"):
        text = path.read_text(errors="replace") if path.is_file() else ""
        for secret in (
            token,
            "Berta",
            "berta",
            "registry.internal",
            "my-secret",
            str(tmp_path),
            "2.5\n",
        ):
            assert secret not in text, (path, secret)


def test_exports_name_the_tuned_model_as_their_base(run_dir: Path, hub) -> None:
    assert to_hub(run_dir, hub, "out").returncode == 0
    bases = {
        repo: [
            front_matter(hub.content(repo, "README.md").decode()).get(key)
            for key in ("base_model", "base_model_relation")
        ]
        for repo in REPOS
    }
    assert bases == {
        "me/mine-lora": ["org/base", "adapter"],
        "me/mine": ["org/base", "finetune"],
        "me/mine-gguf": ["me/mine", "quantized"],
        "me/mine-gptq-4bit": ["me/mine", "quantized"],
    }


def test_exports_in_a_directory_name_no_base(run_dir: Path, tmp_path: Path) -> None:
    """On the Hub, the name of a folder could be that of another model."""
    assert publish(run_dir, f"dir:{tmp_path}/out", "out").returncode == 0
    bases = {
        name: [
            front_matter((tmp_path / "out" / name / "README.md").read_text()).get(key)
            for key in ("base_model", "base_model_relation")
        ]
        for name in ("mine-lora", "mine", "mine-gguf", "mine-gptq-4bit")
    }
    assert bases == {
        "mine-lora": ["org/base", "adapter"],
        "mine": ["org/base", "finetune"],
        "mine-gguf": [None, None],
        "mine-gptq-4bit": [None, None],
    }


def edit(card: str) -> str:
    """Edit a card as people do: metadata, above, below, and by mistake within our part."""
    card = card.replace("pipeline_tag: text-generation", "pipeline_tag: text2text-generation")
    card = card.replace("---\n\n<!--", "co2_eq_emissions: 3\n---\nRead this first.\n\n<!--", 1)
    card = card.replace("## Made from", "## Made from, as I see it")
    return card + "\n## Limits\n\nIt cannot count.\n"


def test_what_people_wrote_and_added_stays_on_the_hub(run_dir: Path, hub) -> None:
    assert to_hub(run_dir, hub, "one").returncode == 0
    files = hub.repos["me/mine-gguf"]["files"]
    files["README.md"] = ("regular", edit(files["README.md"][1].decode()).encode())
    files["curve.png"] = ("regular", b"png")
    files["system"] = ("regular", b"{}")
    hub.repos["me/mine-gguf"]["commits"].append("e" * 40)
    write_again(run_dir, {"q8_0": {"bits_per_weight": 8.7}})
    done = to_hub(run_dir, hub, "two")
    assert done.returncode == 0, done.stderr
    assert "somebody edited the part of README.md between tuneline's markers" in done.stderr
    assert files["curve.png"][1] == b"png" and files["system"][1] == b"{}"
    card = files["README.md"][1].decode()
    assert front_matter(card)["pipeline_tag"] == "text2text-generation"
    assert front_matter(card)["co2_eq_emissions"] == 3
    assert front_matter(card)["base_model"] == "me/mine"
    parts = split_card(card)
    assert parts.before == "Read this first.\n"
    assert parts.after == "\n## Limits\n\nIt cannot count.\n"
    assert "## Made from\n" in card and "| 8.70 |" in card and "as I see it" not in card
    number = len(hub.repos["me/mine-gguf"]["commits"])
    assert to_hub(run_dir, hub, "three").returncode == 0
    assert len(hub.repos["me/mine-gguf"]["commits"]) == number, "nothing changed"


def test_a_card_that_another_editor_saved_keeps_its_front_matter() -> None:
    card = join_card(CardParts({"license": "mit", "tags": ["two words"]}, "Ours.\n", "7", "\nEnd."))
    for text in ("\ufeff" + card, "\ufeff" + card.replace("\n", "\r\n"), f"\n{card}"):
        assert split_card(text) == split_card(card)
    assert split_card(card).front_matter["tags"] == ["two words"]


def test_a_card_without_markers_is_kept_whole(run_dir: Path, hub) -> None:
    assert to_hub(run_dir, hub, "one").returncode == 0
    files = hub.repos["me/mine"]["files"]
    files["README.md"] = ("regular", b"# My own card")
    hub.repos["me/mine"]["commits"].append("e" * 40)
    write_again(run_dir, {"q8_0": {"bits_per_weight": 8.7}})
    done = to_hub(run_dir, hub, "two")
    assert files["README.md"][1] == b"# My own card"
    assert "README.md has no markers of tuneline any more, so it is kept" in done.stderr


def test_what_the_last_bundle_lists_is_replaced_and_nothing_else(run_dir: Path, hub) -> None:
    """A format that is not made any more goes, the weights that somebody added stay."""
    assert to_hub(run_dir, hub, "one").returncode == 0
    repo = hub.repos["me/mine-gguf"]
    repo["files"]["mine-f16.gguf"] = ("regular", b"theirs")
    marker = json.loads(repo["files"]["tuneline.json"][1])
    marker["files"]["mine-q2_k.gguf"] = "0" * 64
    repo["files"]["tuneline.json"] = ("regular", json.dumps(marker).encode())
    repo["files"]["mine-q2_k.gguf"] = ("regular", b"ours, of an earlier run")
    assert to_hub(run_dir, hub, "two").returncode == 0
    assert "mine-q2_k.gguf" not in repo["files"] and "mine-f16.gguf" in repo["files"]
    repo["files"]["mine-q8_0.gguf"] = ("regular", b"theirs")
    marker["files"].pop("mine-q8_0.gguf")
    repo["files"]["tuneline.json"] = ("regular", json.dumps(marker).encode())
    done = to_hub(run_dir, hub, "three")
    assert done.returncode == 2
    assert "mine-q8_0.gguf, which its tuneline.json does not list, so somebody added" in done.stderr
    assert repo["files"]["mine-q8_0.gguf"][1] == b"theirs"


def test_two_recipes_share_a_directory(run_dir: Path, tmp_path: Path) -> None:
    target = f"dir:{tmp_path}/out"
    assert publish(run_dir, target, "one").returncode == 0
    first = tmp_path / "out" / "mine"
    (first / "notes").mkdir()
    (first / "notes" / "mine.txt").write_text("by hand")
    card = first / "README.md"
    card.write_text(edit(card.read_text()))
    weights = (first / "model.safetensors").read_bytes()
    other = recipe_of(publish_to=target).model_copy(update={"name": "other"})
    done = publish(run_dir, target, "two", recipe=other)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    suffixes = ("", "-lora", "-gguf", "-gptq-4bit")
    assert names == {f"{name}{suffix}" for name in ("mine", "other") for suffix in suffixes}
    assert (first / "model.safetensors").read_bytes() == weights
    (run_dir / "merged" / "model.safetensors").write_bytes(b"another")
    write_again(run_dir)
    assert publish(run_dir, target, "three").returncode == 0
    assert (first / "model.safetensors").read_bytes() == b"another"
    assert (first / "notes" / "mine.txt").read_text() == "by hand"
    assert "It cannot count." in card.read_text() and BEGIN in card.read_text()
    assert not list((tmp_path / "out").glob(".publish.*"))
    # The name of one model is that of another one's export.
    clash = recipe_of(publish_to=target).model_copy(update={"name": "mine-gguf"})
    done = publish(run_dir, target, "four", recipe=clash)
    assert "holds the kind 'gguf' of another run" in done.stderr and done.returncode == 2


def test_only_a_models_files_are_published(run_dir: Path, tmp_path: Path) -> None:
    """A base model's directory may hold anything; its records list it, and it stays here."""
    merged = run_dir / "merged"
    private = (
        ".env",
        ".old.safetensors",
        "credentials.json",
        "notes.txt",
        "train.py",
        ".git/config",
        "id_rsa",
    )
    for name in (*private, "LICENSE", "tokenizer.json", "vocab.json", "chat_template.jinja"):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("{}")
    write_again(run_dir)
    done = publish(run_dir, f"dir:{tmp_path}/out", "one")
    assert done.returncode == 0, done.stderr
    published = tmp_path / "out" / "mine"
    assert {path.name for path in published.iterdir()} == {
        *("LICENSE", "README.md", "chat_template.jinja", "config.json", "model.safetensors"),
        *("serving", "tokenizer.json", "tuneline.json", "vocab.json"),
    }
    left_out = sorted(f"mine: {name}" for name in private)
    assert sorted(Published.read(run_dir / "one").left_out) == left_out
    assert (
        "not published, because their names are not those of a model's files: .env" in done.stderr
    )
    assert all(found.differences == [] for found in verify(tmp_path / "out"))
    write_again(run_dir, {"base": {"runs_own_code": True}})
    assert publish(run_dir, f"dir:{tmp_path}/code", "two").returncode == 0
    assert (tmp_path / "code" / "mine" / "train.py").is_file()


def test_a_link_that_leads_out_of_an_artifact_is_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (run_dir / "merged" / "tokenizer.json").symlink_to(tmp_path / "secret")
    write_again(run_dir)
    done = publish(run_dir, f"dir:{tmp_path}/out", "one")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "tokenizer.json is a link that leads out of its artifact" in done.stderr


def test_a_full_account_is_no_matter_of_the_token(run_dir: Path, hub) -> None:
    said = "Private repository storage limit reached, please upgrade your plan"
    hub.says = said
    hub.faults = [(r"POST /me/mine\.git/info/lfs/objects/batch", 403, 9)]
    done = to_hub(run_dir, hub, "out")
    assert done.returncode == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert f"no storage left (403). The Hub says: {said}. The token is not the cause" in sentence
    assert "publish.private to false" in sentence and "write access" not in sentence
    assert set(hub.repos) == {"me/mine-lora"}, "those that hold nothing are deleted again"


def test_a_visibility_that_the_recipe_forbids_is_found_first(run_dir: Path, hub) -> None:
    assert to_hub(run_dir, hub, "one").returncode == 0
    assert Published.read(run_dir / "one").private is True
    hub.repos["me/mine"]["private"] = False
    environment = {"HF_ENDPOINT": f"{hub.url}/", "HF_TOKEN": TOKEN}
    done = publish(run_dir, "me/mine", "two", config={"private": True}, **environment)
    assert done.returncode == 2
    assert "publish.private is true, but the repository me/mine exists and is public" in done.stderr
    done = publish(run_dir, "me/mine/", "three", **environment)
    assert done.returncode == 0, done.stderr
    record = Published.read(run_dir / "three")
    assert record.private is False and record.target == "me/mine"
    assert [repo.private for repo in record.repos] == [True, False, True, True]
    assert record.repos[1].url == f"{hub.url}/me/mine"


@pytest.mark.parametrize("name", ["decision", "merged"])
def test_an_edited_record_is_not_published(run_dir: Path, tmp_path: Path, name: str) -> None:
    (path,) = (
        (run_dir / name).glob("*.json")
        if name == "decision"
        else [run_dir / name / MergeProof.filename]
    )
    text = path.read_text()
    path.write_text(text.replace("0.50", "0.90").replace("0.0003", "0.0001"))
    assert path.read_text() != text
    done = publish(run_dir, f"dir:{tmp_path}/out", "one")
    assert f"{path.name} was changed after it was written" in done.stderr
    # Without its hash, and without its lineage.
    for lost in ({"record_sha256": ""}, {"made_from": {}, "record_sha256": ""}):
        path.write_text(json.dumps(json.loads(text) | lost, indent=2))
        done = publish(run_dir, f"dir:{tmp_path}/out", "one")
        assert done.returncode == 1 and "has no hash of its own fields" in done.stderr
    if name == "merged":
        # With a hash of its own, but from nowhere.
        MergeProof.parse(text).write(path.parent, MergeConfig())
        done = publish(run_dir, f"dir:{tmp_path}/out", "one")
        assert "merge.json of the merged does not name the base_model" in done.stderr
    assert not (tmp_path / "out").exists()


def test_hostile_text_stays_text(run_dir: Path, tmp_path: Path) -> None:
    evil = "|<img src=x onerror=alert(1)> [a](javascript:b) `c` ![d](http://e)\n# F\u202e" + END
    evil += "\n```\n<b>\u00ad\u061c\U000e0041"
    decision = Decision.read(run_dir / "decision")
    scores = [
        item.model_copy(update={"task": evil, "metric": evil}) for item in decision.comparisons
    ]
    write_again(
        run_dir,
        {
            "base": {"licence": evil, "revision": None, "source": f"/x/{evil}"},
            "dataset": {"licence": evil, "source": evil},
            "q8_0": {"generated": evil, "notes": [evil], "stop_tokens": [evil]},
            "decision": {"reason": evil, "remarks": [evil], "comparisons": scores},
        },
    )
    recipe = recipe_of(evil, publish_to=f"dir:{tmp_path}/out")
    done = publish(run_dir, f"dir:{tmp_path}/out", "one", recipe=recipe)
    assert done.returncode == 0, done.stderr
    parser = MarkdownIt("commonmark").enable("table")
    for repo in ("mine", "mine-gguf"):
        parts = split_card((tmp_path / "out" / repo / "README.md").read_text())
        assert parts.before == parts.after == ""
        assert not {*"\u202e\u00ad\u061c\U000e0041"} & {*parts.ours.split("## Recipe")[0]}
        tokens = [
            inner
            for token in parser.parse(parts.ours)
            for inner in (token, *(token.children or ()))
        ]
        assert not {token.type for token in tokens} & {"html_inline", "html_block", "image"}
        assert [token.attrs for token in tokens if token.type == "link_open"] == []
        titles = [
            tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open"
        ]
        assert len(titles) == len({*titles}) and not [title for title in titles if title[0] == "F"]
        rows = [token.type for token in tokens if token.type in ("tr_open", "th_open", "td_open")]
        cells = [len(row.split()) for row in " ".join(rows).split("tr_open") if row]
        # Figures of training, points of the curve, scores, exports.
        assert {*cells} == {2, 3, 8, 10}


def test_an_adapter_of_another_rank_than_recorded_is_refused(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "adapter/adapter_config.json").write_text('{"r": 8}')
    write_again(run_dir)
    done = publish(run_dir, f"dir:{tmp_path}/out", "out")
    assert done.returncode != 0
    assert "adapter_config.json has r 8, but training.json says" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_same_model_trained_again_makes_no_commit(run_dir: Path, hub) -> None:
    """Two equal runs differ in speed and times only, which card and progress.jsonl have."""
    assert to_hub(run_dir, hub, "one").returncode == 0
    commits = {repo: list(hub.repos[repo]["commits"]) for repo in REPOS}
    (run_dir / "adapter/progress.jsonl").write_text('{"step": 1, "tokens_per_second": 99}\n')
    write_again(run_dir, changes={"adapter": {"tokens_per_second": 99.0, "seconds": 7.0}})
    done = to_hub(run_dir, hub, "two")
    assert done.returncode == 0, done.stderr
    assert "me/mine holds the same model already" in done.stderr
    assert {repo: hub.repos[repo]["commits"] for repo in REPOS} == commits
