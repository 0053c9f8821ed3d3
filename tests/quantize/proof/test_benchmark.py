"""Scores of exports on held-out rows: by hand-made models, and held against the evaluate step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tuneline.artifacts import (
    HELDOUT_FILE,
    DatasetManifest,
    QuantizedModel,
    read_jsonl,
    write_jsonl,
)
from tuneline.errors import ModelError
from tuneline.models.likelihood import Pair
from tuneline.quantize import QuantizeConfig
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.proof.benchmark import CHOICE, EXACT, answer, prepare
from tuneline.quantize.proof.transformers_model import TransformersModel
from tuneline.quantize.run import run

ROWS = [
    {"prompt": "ab", "answer": "c", "end": ".\n", "choices": ["d", "c", "e"], "label": 1},
    {"prompt": "aa", "answer": "e", "end": ".\n", "choices": ["e", "c"], "label": 0},
]


class Letters:
    """A model over letters that answers with one of them, and then ends."""

    begin_id = ord("a")

    def __init__(self, favourite: str) -> None:
        self.favourite = favourite

    def tokenise(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def score_answers(self, pairs: list[Pair]) -> dict[Pair, tuple[float, bool]]:
        scores = {}
        for prompt, tokens in pairs:
            before = (prompt[-1], *tokens[:-1])
            right = [
                token == ord(self.favourite if chr(last) in "ab" else ".")
                for last, token in zip(before, tokens, strict=True)
            ]
            scores[prompt, tokens] = (-5.0 * right.count(False), all(right))
        return scores


@pytest.mark.parametrize(
    ("favourite", "right"),
    [("c", [True, False]), ("e", [False, True]), ("d", [False, True]), ("x", [False, True])],
)
def test_choices_by_likelihood(favourite: str, right: list[bool]) -> None:
    # "x" and "d" leave draws, of which the first counts: wrong in one row and right in the other.
    assert answer(Letters(favourite), ROWS, CHOICE, begin_id=None) == right


def test_an_empty_prompt_begins_with_the_token_that_begins_a_text() -> None:
    bare = [{**row, "prompt": ""} for row in ROWS]
    assert answer(Letters("c"), bare, CHOICE, begin_id=ord("a")) == [True, False]
    assert answer(Letters("c"), bare, EXACT, begin_id=ord("b")) == [True, False]
    assert answer(Letters("c"), bare, EXACT, begin_id=ord("x")) == [False, False]
    # An answer that begins with it has it once, as lm-eval scores it.
    begun = [{**bare[0], "answer": "ac"}]
    assert answer(Letters("c"), begun, EXACT, begin_id=ord("a")) == [True]


def test_exact_answers() -> None:
    assert answer(Letters("c"), ROWS, EXACT, begin_id=None) == [True, False]
    assert answer(Letters("d"), ROWS, EXACT, begin_id=None) == [False, False]


def test_an_export_and_the_merged_model_are_paired_row_by_row(tmp_path: Path) -> None:
    """Rows with one question, or with the same `cluster`, count as one."""
    rows = [
        *ROWS,
        {**ROWS[0], "prompt": "AB."},
        {**ROWS[1], "prompt": "ba", "cluster": "x"},
        {**ROWS[1], "prompt": "bb", "cluster": "x"},
    ]
    write_jsonl(tmp_path / HELDOUT_FILE, rows)
    benchmark = prepare(Letters("c"), tmp_path, 9)
    assert benchmark is not None
    fields = benchmark.record(Letters("e"))
    answers = fields["benchmark_answers"]
    assert answers.merged == answer(Letters("c"), rows, CHOICE, begin_id=None)
    assert answers.export == answer(Letters("e"), rows, CHOICE, begin_id=None)
    assert answers.merged[:2] == [True, False] and answers.export[:2] == [False, True]
    assert answers.clusters == [0, 1, 0, 2, 2]
    assert fields["benchmark_score"] == sum(answers.export) / 5
    assert fields["reference_benchmark_score"] == sum(answers.merged) / 5


def test_the_task_is_what_the_rows_allow(tmp_path: Path) -> None:
    assert prepare(Letters("c"), tmp_path, 4) is None
    write_jsonl(tmp_path / HELDOUT_FILE, ROWS)
    assert prepare(Letters("c"), tmp_path, 0) is None
    found = prepare(Letters("c"), tmp_path, 1)
    assert found is not None and (found.task, found.reference) == (CHOICE, [True])
    assert found.num_context >= len("abc.\n")
    plain = [{key: row[key] for key in ("prompt", "answer", "end")} for row in ROWS]
    write_jsonl(tmp_path / HELDOUT_FILE, plain)
    found = prepare(Letters("c"), tmp_path, 4)
    assert found is not None and (found.task, len(found.rows)) == (EXACT, 2)


def test_answers_are_scored_as_each_by_itself(merged_dir: Path, f16_dir: Path) -> None:
    """In an order that shows what an answer leaves behind."""
    transformers = TransformersModel(merged_dir)

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(transformers.tokenise(text))

    prompt, other = tokens("How many Mi are 3Gi?"), tokens("And 5?")
    long, short = tokens(" 3072Mi are as many."), tokens(" 96 MB")
    likely = (int(transformers.logits(list(prompt))[-1].argmax()),)
    pairs = [(prompt, long), (prompt, short), (prompt, likely), (prompt, short[:1]), (other, long)]
    with LlamaFile(f16_dir / "model-F16.gguf", num_context=64) as llama:
        for model in (transformers, llama):
            found = model.score_answers(pairs)
            assert list(sorted(found)) == sorted(pairs)
            for (before, after), (likelihood, greedy) in found.items():
                logits_TV = torch.as_tensor(model.logits([*before, *after]))[len(before) - 1 : -1]
                chosen_A = logits_TV.log_softmax(-1)[range(len(after)), list(after)]
                assert likelihood == pytest.approx(chosen_A.sum().item(), abs=1e-4)
                assert greedy == (after == likely)


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\n{n}Gi in Mi?<|im_end|>\n<|im_start|>",
        pytest.param("", marks=pytest.mark.slow),
    ],
)
def test_files_are_scored_as_evaluate_scores_the_model(
    prompt: str,
    merged_dir: Path,
    f16_dir: Path,
    dataset_dir: Path,
    new_dataset: Callable[..., DatasetManifest],
    tmp_path: Path,
) -> None:
    """The merged model's score is lm-eval's on the same rows, and f16's is the same.

    Rows of raw text have no prompt: lm-eval begins them with a token, and so do exports.
    """
    import shutil

    from tuneline.artifacts import Scores
    from tuneline.evaluate import EvaluateConfig
    from tuneline.evaluate.run import run as evaluate

    data = tmp_path / "dataset"
    shutil.copytree(dataset_dir, data)
    rows = [
        {
            "prompt": prompt.format(n=n),
            "answer": f"{1024 * n}Mi",
            "end": "<|im_end|>\n",
            "question": f"{n}Gi in Mi?",
            # Of the same length, so that a random model is sometimes right.
            "choices": [f"{1024 * n + step}Mi" for step in (3, 0, 1, 4)],
            "label": 1,
        }
        for n in range(1, 10)
    ]
    write_jsonl(data / HELDOUT_FILE, rows)
    new_dataset(num_heldout_rows=len(rows)).write(data)
    scores: Scores = evaluate(
        EvaluateConfig(tasks=("heldout_choice",), num_generations=0),
        label="tuned",
        model_dir=str(merged_dir),
        dataset_dir=str(data),
        scores_dir=str(tmp_path / "scores"),
    )
    record: QuantizedModel = run(
        QuantizeConfig(num_check_tokens=2, num_proof_prompts=2, num_benchmark_rows=9),
        format="f16",
        merged_dir=str(merged_dir),
        gguf_dir=str(f16_dir),
        dataset_dir=str(data),
        quantized_dir=str(tmp_path / "f16"),
    )
    wanted = scores.tasks["heldout_choice"].value
    assert 0 < wanted < 1, "a random model is sometimes right"
    assert record.benchmark == "heldout_choice" and record.num_benchmark_rows == 9
    assert record.reference_benchmark_score == pytest.approx(wanted)
    assert record.benchmark_score == pytest.approx(wanted)
    kept = QuantizedModel.read(tmp_path / "f16").benchmark_answers
    assert kept is not None
    samples = read_jsonl(tmp_path / "scores" / "samples" / "heldout_choice.jsonl")
    assert kept.merged == kept.export == [bool(row["score"]) for row in samples]


@pytest.mark.slow
def test_a_record_holds_the_settings_that_it_was_made_with(
    merged_dir: Path, f16_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(num_check_tokens=2, num_proof_prompts=1, max_mean_kl={"q8_0": 1.0})
    run(
        config,
        format="q8_0",
        merged_dir=str(merged_dir),
        gguf_dir=str(f16_dir),
        dataset_dir=str(dataset_dir),
        quantized_dir=str(tmp_path / "q8"),
    )
    kept = QuantizedModel.read(tmp_path / "q8")
    assert QuantizeConfig.parse(kept.settings) == config
    assert kept.settings["num_calibration_rows"] == 128, "defaults are written out"


def test_a_tokenizer_without_a_token_for_an_empty_prompt(merged_dir: Path) -> None:
    model = TransformersModel(merged_dir)
    assert model.begin_id == model.tokenizer.bos_token_id
    model.tokenizer.bos_token = None
    assert model.begin_id == model.tokenizer.eos_token_id
    model.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither bos_token nor eos_token, and a held-out row"):
        _ = model.begin_id
