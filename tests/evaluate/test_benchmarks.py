"""The questions of lm-eval's tasks, as prepare gets them."""

from pathlib import Path

import pytest

from tuneline.artifacts import read_jsonl
from tuneline.errors import TaskError
from tuneline.evaluate import EvaluateConfig
from tuneline.evaluate.benchmarks import collect

KOBEST = Path(__file__).parents[1] / "data" / "kobest" / "boolq.tsv"


@pytest.fixture
def task_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks over KoBEST's excerpt: as lm-eval has it, by its own query, and without a question."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = (
        f'dataset_path: csv\ndataset_kwargs: {{data_files: {{test: {KOBEST}}}, sep: "\\t"}}\n'
        "test_split: test\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    choice = "output_type: multiple_choice\ndoc_to_choice: ['no', 'yes']\n"
    (tmp_path / "boolq.yaml").write_text(
        f"task: boolq_ko\n{data}{choice}"
        'doc_to_text: "{{Text}} Q: {{Question}} A:"\ndoc_to_target: "{{Answer|int}}"\n'
    )
    (tmp_path / "query.yaml").write_text(
        f"task: query_ko\n{data}{choice}"
        'doc_to_text: "{{Text}} Q: {{Question}} A:"\ndoc_to_target: "{{Answer|int}}"\n'
        "should_decontaminate: true\ndoc_to_decontamination_query: Text\n"
    )
    (tmp_path / "texts.yaml").write_text(
        f"task: texts_ko\n{data}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{Text}}"\n'.replace("acc", "word_perplexity")
    )
    return tmp_path


def test_questions_are_what_the_task_asks(task_dir: Path, tmp_path: Path) -> None:
    rows = [line.split("\t") for line in KOBEST.read_text(encoding="utf-8").splitlines()[1:]]
    path = tmp_path / "questions.jsonl"
    names = ("heldout_exact", "boolq_ko", "query_ko", "texts_ko")
    config = EvaluateConfig(tasks=names, task_dir=str(task_dir), limit=5)
    counts = collect(config, questions_path=str(path))
    assert counts == {"boolq_ko": 5, "query_ko": 5, "texts_ko": 5}
    written = read_jsonl(path)
    assert written[:5] == [
        {
            "benchmark": "boolq_ko",
            "text": f"{text} Q: {question} A:",
            "answer": "yes" if answer == "True" else "no",
        }
        for _, text, question, answer in rows[:5]
    ]
    assert [row["text"] for row in written[5:]] == [row[1] for row in rows[:5]] * 2
    assert [row["answer"] for row in written[10:]] == [""] * 5


def test_a_task_that_does_not_exist_is_named(tmp_path: Path) -> None:
    config = EvaluateConfig(tasks=("hellaswagg",))
    with pytest.raises(TaskError, match="hellaswag"):
        collect(config, questions_path=str(tmp_path / "questions.jsonl"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
            r"bad.yaml stands for [\d,]+ values",
        ),
        ("a: " + "[" * 3000, "bad.yaml is nested deeper than YAML is read"),
        ("a: [1, 2", "cannot read the task file .*bad.yaml: while parsing"),
    ],
)
def test_task_files_that_lm_eval_would_choke_on(
    text: str, says: str, task_dir: Path, tmp_path: Path
) -> None:
    (task_dir / "bad.yaml").write_text(text)
    config = EvaluateConfig(tasks=("boolq_ko",), task_dir=str(task_dir))
    with pytest.raises(TaskError, match=says):
        collect(config, questions_path=str(tmp_path / "questions.jsonl"))


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_link_out_of_the_directory_of_tasks(
    is_directory: bool, task_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "utils.py").write_text("raise SystemExit")
    (task_dir / "utils.py").symlink_to(elsewhere if is_directory else elsewhere / "utils.py")
    config = EvaluateConfig(tasks=("boolq_ko",), task_dir=str(task_dir))
    with pytest.raises(TaskError, match=rf"utils\.py is a link that leads out of {task_dir}, to"):
        collect(config, questions_path=str(tmp_path / "questions.jsonl"))
