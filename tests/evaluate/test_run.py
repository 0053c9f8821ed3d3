"""evaluate on a tiny model, against likelihoods and generations computed one by one."""

import json
import math
import shutil
from pathlib import Path

import pytest

from tuneline.artifacts import PROMPT_CONTROL, Scores, read_jsonl, write_jsonl
from tuneline.errors import HubError, ModelError, TaskError, WorldError
from tuneline.evaluate import EvaluateConfig
from tuneline.evaluate import model as evaluate_model
from tuneline.evaluate.run import run
from tuneline.evaluate.samples import primary_metric, rows_of, score_of

OURS = ("heldout_choice", "heldout_exact", "heldout_perplexity")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def log_probs(model, tokenizer, prompt: str, answer: str) -> list[float]:
    """Return the log probability of each token of the answer, one sequence alone."""
    import torch

    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    assert ids[: len(prompt_ids)] == prompt_ids
    with torch.inference_mode():
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [table[place - 1, ids[place]].item() for place in range(len(prompt_ids), len(ids))]


def greedy(model, tokenizer, prompt: str, num_tokens: int) -> list[int]:
    """Generate by the most likely token, one forward a token."""
    import torch

    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    made: list[int] = []
    with torch.inference_mode():
        while len(made) < num_tokens and end not in made:
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def what_it_says(model, tokenizer, rows: list[dict]) -> tuple[str, str]:
    """Return a prompt and a greedy answer whose text stands for just those tokens."""
    for row in rows:
        for num_tokens in (3, 2, 1):
            made = greedy(model, tokenizer, row["prompt"], num_tokens)
            text = tokenizer.decode(made)
            if tokenizer.encode(text, add_special_tokens=False) == made:
                return row["prompt"], text
    raise AssertionError("no greedy answer survives decoding and encoding")


def evaluate(tmp_path: Path, model_dir: Path, dataset: Path, **config) -> tuple[Scores, Path]:
    scores_dir = tmp_path / "scores"
    result = run(
        EvaluateConfig(**config),
        label="base",
        model_dir=str(model_dir),
        dataset_dir=str(dataset),
        scores_dir=str(scores_dir),
    )
    return result, scores_dir


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_the_recipe_decides_whether_layers_may_run_fused(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, monkeypatch, kernels
):
    score_answers, allowed = evaluate_model.score_answers, []

    def noted(*args, fuses, **kwargs):
        allowed.append(fuses)
        return score_answers(*args, fuses=fuses, **kwargs)

    monkeypatch.setattr(evaluate_model, "score_answers", noted)
    dataset = write_dataset(heldout_rows())
    evaluate(tmp_path, tiny_model_dir, dataset, tasks=("heldout_perplexity",), kernels=kernels)
    assert set(allowed) == {kernels == "auto"}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_against_single_sequences(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, model, tokenizer, batch_size
):
    # An answer that the model does give greedily, so that heldout_exact is not all zeros.
    rows = heldout_rows()
    prompt, said = what_it_says(model, tokenizer, rows)
    rows.append({"prompt": prompt, "answer": said, "choices": [said, "7"], "label": 0})
    rows[-1] |= {"question": "again", "end": ""}
    result, scores_dir = evaluate(
        tmp_path, tiny_model_dir, write_dataset(rows), tasks=OURS, batch_size=batch_size
    )
    choice, exact, perplexity = (
        read_jsonl(scores_dir / "samples" / f"{task}.jsonl") for task in OURS
    )
    nats = num_tokens = 0.0
    for row, chosen, same, likely in zip(rows, choice, exact, perplexity, strict=True):
        end = row["end"].strip()
        sums = [
            sum(log_probs(model, tokenizer, row["prompt"], option + end))
            for option in row["choices"]
        ]
        assert chosen["score"] == float(sums.index(max(sums)) == row["label"])
        answer = log_probs(model, tokenizer, row["prompt"], row["answer"] + end)
        assert likely["weight"] == len(answer)
        assert likely["score"] == pytest.approx(-sum(answer) / len(answer), abs=1e-5)
        reference = tokenizer.encode(row["answer"] + end, add_special_tokens=False)
        made = greedy(model, tokenizer, row["prompt"], len(answer))
        assert same["score"] == float(made == reference)
        nats, num_tokens = nats - sum(answer), num_tokens + len(answer)
    assert exact[-1]["score"] == 1.0
    assert result.tasks["heldout_choice"].value == pytest.approx(
        sum(row["score"] for row in choice) / len(rows)
    )
    # Over all tokens, not the mean of the rows' means.
    assert result.tasks["heldout_perplexity"].value == pytest.approx(nats / num_tokens, abs=1e-5)
    assert not result.tasks["heldout_perplexity"].higher_is_better
    # What writing adds: the time, hashes, versions, settings, what it goes back to.
    added = {"created_at", "files", "environment", "settings", "made_from", "record_sha256"}
    kept = Scores.read(scores_dir)
    assert result.model_dump(exclude=added) == kept.model_dump(exclude=added)
    assert set(kept.made_from) == {"dataset", "base_model"}


def test_ids_are_the_same_for_another_model_and_another_limit(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows
):
    dataset = write_dataset(heldout_rows())
    ids = {}
    for limit in (None, 2):
        _, scores_dir = evaluate(
            tmp_path / str(limit), tiny_model_dir, dataset, tasks=("heldout_exact",), limit=limit
        )
        rows = read_jsonl(scores_dir / "samples" / "heldout_exact.jsonl")
        ids[limit] = [row["id"] for row in rows]
    assert len(set(ids[None])) == 5
    assert ids[2] == ids[None][:2]


def test_generations_are_greedy_and_stop_at_the_end_of_turn(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, model, tokenizer
):
    rows = heldout_rows()
    _, scores_dir = evaluate(
        tmp_path,
        tiny_model_dir,
        write_dataset(rows),
        tasks=("heldout_exact",),
        num_generations=4,
        max_new_tokens=7,
    )
    made = read_jsonl(scores_dir / "generations.jsonl")
    assert [set(row) for row in made] == [{"question", "prompt", "answer", "text"}] * 4
    for row, source in zip(made, rows, strict=False):
        assert row["question"] == source["question"]
        made = greedy(model, tokenizer, source["prompt"], 7)
        assert row["text"] == tokenizer.decode(made, skip_special_tokens=True).strip()


def test_a_task_directory_with_data_beside_it_needs_no_network(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, monkeypatch, model, tokenizer
):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_jsonl(tasks / "rows.jsonl", [{"q": "One and one is", "a": "two"}, {"q": "X", "a": "y"}])
    (tasks / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"
        "doc_to_choice: '{{[a, \"zebra\"]}}'\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result, scores_dir = evaluate(
        tmp_path,
        tiny_model_dir,
        write_dataset(heldout_rows()),
        tasks=("sums",),
        task_dir=str(tasks),
        num_generations=0,
    )
    assert result.tasks["sums"].num_samples == 2
    expected = []
    for question, answer in (("One and one is", "two"), ("X", "y")):
        sums = [
            sum(log_probs(model, tokenizer, question, " " + word)) for word in (answer, "zebra")
        ]
        expected.append(float(sums[0] >= sums[1]))
    rows = read_jsonl(scores_dir / "samples" / "sums.jsonl")
    assert [row["score"] for row in rows] == expected
    assert read_jsonl(scores_dir / "generations.jsonl") == []


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"tasks": ("heldout_choise",)}, "did you mean heldout_choice"),
        ({"tasks": ("hellaswagg",)}, "hellaswag"),
        ({"tasks": ()}, "is empty"),
        ({"tasks": ("heldout_exact",), "task_dir": "/no/such/place"}, "no directory /no/such"),
    ],
)
def test_a_bad_task_is_said_before_the_model_is_loaded(
    tmp_path, write_dataset, heldout_rows, config, says
):
    # There is no model at all: what is wrong with the task has to be found without it.
    with pytest.raises(TaskError, match=says):
        evaluate(tmp_path, tmp_path / "absent", write_dataset(heldout_rows()), **config)
    assert not (tmp_path / "scores").exists()


def test_choices_are_needed_by_heldout_choice_only(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows
):
    dataset = write_dataset(heldout_rows(choices=False))
    with pytest.raises(TaskError, match="5 of 5 have none"):
        evaluate(tmp_path, tiny_model_dir, dataset, tasks=("heldout_choice",))
    result, _ = evaluate(
        tmp_path, tiny_model_dir, dataset, tasks=("heldout_exact",), num_generations=0
    )
    assert result.tasks["heldout_exact"].num_samples == 5


def test_no_heldout_rows(tmp_path, tiny_model_dir, write_dataset):
    with pytest.raises(TaskError, match=r"prepare\.heldout\.max_rows"):
        evaluate(tmp_path, tiny_model_dir, write_dataset([]), tasks=("heldout_exact",))


@pytest.mark.slow
def test_data_that_are_not_on_this_machine(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, monkeypatch
):
    import datasets
    import huggingface_hub.constants

    # What HF_HUB_OFFLINE=1 sets; both libraries read the variable when they are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(HubError, match="'kobest_copa' are not on this machine"):
        evaluate(tmp_path, tiny_model_dir, write_dataset(heldout_rows()), tasks=("kobest_copa",))
    assert not (tmp_path / "scores").exists()


def test_a_task_file_whose_data_file_is_missing(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows
):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "t.yaml").write_text(
        "task: t\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n"
        "test_split: train\noutput_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: a\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    with pytest.raises(TaskError, match=r"gone\.jsonl does not exist"):
        evaluate(
            tmp_path,
            tiny_model_dir,
            write_dataset(heldout_rows()),
            tasks=("t",),
            task_dir=str(tasks),
        )


def test_a_model_without_its_tokenizer(tmp_path, tiny_model_dir, write_dataset, heldout_rows):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, bare)
    with pytest.raises(ModelError, match="no tokenizer"):
        evaluate(tmp_path, bare, write_dataset(heldout_rows()), tasks=("heldout_exact",))


def test_a_dataset_directory_that_is_none(tmp_path, tiny_model_dir):
    with pytest.raises(WorldError, match=r"no dataset\.json"):
        evaluate(tmp_path, tiny_model_dir, tmp_path, tasks=("heldout_exact",))


def test_fewshot_is_said_to_be_ignored(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, caplog
):
    evaluate(
        tmp_path,
        tiny_model_dir,
        write_dataset(heldout_rows()),
        tasks=("heldout_exact",),
        num_fewshot=3,
        num_generations=0,
    )
    assert "num_fewshot 3 is ignored for heldout_exact" in caplog.text


def test_the_standard_error_of_weighted_scores():
    rows = [{"id": "a", "score": 1.0, "weight": 3}, {"id": "b", "score": 2.0, "weight": 1}]
    score = score_of(rows, metric="log_perplexity", higher_is_better=False)
    assert score.value == pytest.approx(1.25)
    # sqrt(n / (n - 1) * sum (w (x - mean))^2) / sum w
    assert score.stderr == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4)
    plain = score_of([{"score": x} for x in (1.0, 0.0, 1.0, 1.0)], metric="acc", higher_is_better=1)
    assert plain.value == 0.75
    assert plain.stderr == pytest.approx(0.5 / 2)  # standard deviation 0.5 over sqrt(4)


def test_the_metric_that_can_be_compared_is_chosen():
    sample = {
        "doc_id": 0,
        "doc_hash": "0123456789abcdef",
        "doc": {"q": 1},
        "metrics": ["f1", "acc_norm", "acc"],
        "f1": (0, 1),
        "acc_norm": 1.0,
        "acc": 0.0,
    }
    assert primary_metric("t", [sample]) == "acc"
    assert rows_of([sample], "acc") == [{"id": "0-0123456789ab", "score": 0.0}]
    with pytest.raises(TaskError, match="no metric with one number per sample"):
        primary_metric("t", [sample | {"metrics": ["f1"]}])


def test_the_command_line(tmp_path, tiny_model_dir, write_dataset, heldout_rows):
    import subprocess
    import sys

    (tmp_path / "config.json").write_text(json.dumps({"tasks": ["nonsense_task"]}))
    arguments = ["--label", "base", "--model", str(tiny_model_dir)]
    arguments += ["--dataset", str(write_dataset(heldout_rows())), "--scores", str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "-m", "tuneline.evaluate", "--config", tmp_path / "config.json"]
        + arguments,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("evaluate: TaskError: evaluate.tasks: 'nonsense")


def test_the_names_of_groups_stand_for_their_tasks(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, monkeypatch
):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("one", "two"):
        write_jsonl(tasks / f"{name}.jsonl", [{"passage": "A passage.", "q": "X", "a": "y"}] * 3)
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tasks / name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"
            "doc_to_choice: '{{[a, \"zebra\"]}}'\ndoc_to_target: 0\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [one, two]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = write_dataset(heldout_rows())
    result, scores_dir = evaluate(
        tmp_path, tiny_model_dir, dataset, tasks=("both", "heldout_exact"), task_dir=str(tasks)
    )
    assert result.groups == {"both": ["one", "two"]}
    assert set(result.tasks) == {"one", "two", "heldout_exact"}
    # Three samples about one passage are one cluster; five held-out rows are too few for a control.
    clusters = {row["cluster"] for row in read_jsonl(scores_dir / "samples" / "one.jsonl")}
    assert len(clusters) == 1
    exact = read_jsonl(scores_dir / "samples" / "heldout_exact.jsonl")
    assert all("cluster" not in row for row in exact)


def test_the_dependence_on_the_prompt_against_single_sequences(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows, model, tokenizer
):
    rows = [
        {**row, "prompt": row["prompt"].replace("user", f"user {number}")}
        for number in range(5)
        for row in heldout_rows()
    ]
    result, scores_dir = evaluate(
        tmp_path, tiny_model_dir, write_dataset(rows), tasks=("heldout_perplexity",), prompt_rows=22
    )
    samples = read_jsonl(scores_dir / "samples" / f"{PROMPT_CONTROL}.jsonl")
    assert len(samples) == 22 == result.tasks[PROMPT_CONTROL].num_samples
    assert result.tasks[PROMPT_CONTROL].higher_is_better
    for number in (0, 7, 21):
        row = rows[number]
        # The row after half of the rows; one further if it has the same answer.
        others = [rows[(number + 11 + step) % 22] for step in range(22)]
        other = next(other for other in others if other["answer"] != row["answer"])
        answer = row["answer"] + "<|im_end|>"
        own, without = (
            sum(log_probs(model, tokenizer, prompt, answer))
            for prompt in (row["prompt"], other["prompt"])
        )
        assert samples[number]["score"] == pytest.approx(
            (own - without) / samples[number]["weight"], abs=1e-5
        )


def test_the_control_can_be_switched_off(tmp_path, tiny_model_dir, write_dataset, heldout_rows):
    result, _ = evaluate(
        tmp_path,
        tiny_model_dir,
        write_dataset(heldout_rows() * 5),
        tasks=("heldout_exact",),
        prompt_rows=0,
    )
    assert set(result.tasks) == {"heldout_exact"}


def test_files_that_were_changed_are_not_measured(
    tmp_path, tiny_model_dir, write_dataset, heldout_rows
):
    dataset = write_dataset(heldout_rows())
    with open(dataset / "heldout.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(WorldError, match="heldout.jsonl was changed after it was made"):
        evaluate(tmp_path, tiny_model_dir, dataset, tasks=OURS)
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "model.safetensors").unlink()
    write_jsonl(dataset / "heldout.jsonl", heldout_rows())
    with pytest.raises(WorldError, match="model.safetensors is missing"):
        evaluate(tmp_path, model, dataset, tasks=OURS)
