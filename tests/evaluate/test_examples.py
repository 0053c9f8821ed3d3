"""Training rows in the prompt of the base model, against likelihoods computed one by one."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tuneline.artifacts import DatasetManifest, Scores, read_jsonl
from tuneline.evaluate import EvaluateConfig
from tuneline.evaluate.examples import choose, without_begin
from tuneline.evaluate.run import run

TRAIN = [
    "<|im_start|>user\nIs 1 more than 2?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
    "<|im_start|>user\nIs 3 more than 2?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
]


def write_train(directory: Path, **columns: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "train.parquet")


@pytest.fixture
def new_directory_of(tmp_path: Path, new_dataset):
    def make(**values: object) -> Path:
        manifest: DatasetManifest = new_dataset(max_seq_length=10, **values)
        manifest.write(tmp_path)
        return tmp_path

    return make


def test_the_examples_stand_before_the_prompt(
    tmp_path: Path, tiny_model_dir: Path, write_dataset, heldout_rows
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    rows = heldout_rows()
    dataset = write_dataset(rows)
    write_train(dataset, input_ids=[tokenizer(text).input_ids for text in TRAIN])
    scores = {}
    for label in ("base", "tuned"):
        run(
            EvaluateConfig(tasks=("heldout_perplexity",), num_generations=0),
            label=label,
            model_dir=str(tiny_model_dir),
            dataset_dir=str(dataset),
            scores_dir=str(tmp_path / label),
        )
        scores[label] = Scores.read(tmp_path / label)
    assert scores["tuned"].prompted == {} and scores["tuned"].num_examples == 0
    assert scores["base"].num_examples == 2
    # The scores without examples are those of the same model without them.
    assert scores["base"].tasks["heldout_perplexity"] == scores["tuned"].tasks["heldout_perplexity"]
    table = read_jsonl(tmp_path / "base/prompted/heldout_perplexity.jsonl")
    assert [row["id"] for row in table] == [
        row["id"] for row in read_jsonl(tmp_path / "base/samples/heldout_perplexity.jsonl")
    ]
    for row, sample in zip(rows, table, strict=True):
        before = tokenizer("".join(TRAIN) + row["prompt"]).input_ids
        ids = tokenizer("".join(TRAIN) + row["prompt"] + row["answer"] + "<|im_end|>").input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats = -sum(logits[place - 1, ids[place]].item() for place in range(len(before), len(ids)))
        assert sample["score"] * sample["weight"] == pytest.approx(nats, abs=1e-4)


def test_the_first_rows_that_fit_are_taken(
    new_directory_of, caplog: pytest.LogCaptureFixture
) -> None:
    directory = new_directory_of()
    # The second is as long as the maximum, so it may be truncated; the fourth is too much.
    write_train(directory, input_ids=[[1, 2], [3] * 10, [1, 5], [6] * 9, [1, 7, 1]])
    found = choose(directory, num_examples=4, max_tokens=8, begin_id=1)
    # A token that begins a text stands in the first example only, unless it begins turns too.
    assert found == [(1, 2), (5,), (1, 7, 1)]
    assert "only 3 of the first 256 training rows fit" in caplog.text
    assert choose(directory, num_examples=0, max_tokens=8, begin_id=1) == []


def test_good_answers_of_preferences_and_judged_rows(new_directory_of) -> None:
    directory = new_directory_of(method="dpo")
    write_train(directory, prompt_ids=[[1]], chosen_ids=[[2]], rejected_ids=[[3]])
    assert choose(directory, num_examples=1, max_tokens=8, begin_id=None) == [(1, 2)]
    directory = new_directory_of(method="kto")
    write_train(directory, prompt_ids=[[1], [4]], completion_ids=[[2], [5]], label=[False, True])
    assert choose(directory, num_examples=1, max_tokens=8, begin_id=None) == [(4, 5)]


def test_documents_are_no_examples(new_directory_of, caplog: pytest.LogCaptureFixture) -> None:
    directory = new_directory_of(method="cpt")
    write_train(directory, input_ids=[[1, 2]])
    assert choose(directory, num_examples=4, max_tokens=8, begin_id=None) == []
    assert caplog.text == ""


def test_a_model_without_a_begin_token() -> None:
    assert without_begin((1, 2), None) == (1, 2)
    assert without_begin((), 1) == ()
