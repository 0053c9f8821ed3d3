# mypy: allow-untyped-decorators
"""The KFP components of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.EVALUATE, install_kfp_package=False)
def collect_benchmarks(config: str, questions: dsl.Output[dsl.Artifact]) -> None:
    """Collect the questions of the recipe's benchmarks, to search the training rows for them.

    Args:
        config: The `evaluate` section of the recipe as JSON.

    Returns:
        questions: JSON Lines with the question and the answer of each document of each task.
    """
    from tuneline.evaluate import EvaluateConfig
    from tuneline.evaluate.benchmarks import collect
    from tuneline.runtime.step import set_metadata, step

    with step("collect-benchmarks"):
        counts = collect(EvaluateConfig.parse(config), questions_path=questions.path)
        set_metadata(questions, num_questions=sum(counts.values()))


@dsl.component(base_image=images.EVALUATE, install_kfp_package=False)
def evaluate(
    label: str,
    config: str,
    model: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    scores: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure one model on the recipe's benchmarks.

    Args:
        label: The model's role in this run, "base" or "tuned".
        config: The `evaluate` section of the recipe as JSON.
        model: The model to measure.
        dataset: The prepared dataset, with its held-out rows.

    Returns:
        scores: The score of every sample, and the model's answers to held-out prompts.
        metrics: The score of every task.
    """
    from tuneline.evaluate import EvaluateConfig
    from tuneline.evaluate.run import run
    from tuneline.runtime.step import log_metrics, set_metadata, step

    with step("evaluate", label):
        result = run(
            EvaluateConfig.parse(config),
            label=label,
            model_dir=model.path,
            dataset_dir=dataset.path,
            scores_dir=scores.path,
        )
        set_metadata(scores, model=label, harness=result.harness, seconds=result.seconds)
        log_metrics(metrics, {name: score.value for name, score in result.tasks.items()})
