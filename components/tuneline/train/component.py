# mypy: allow-untyped-decorators
"""The KFP components of the step: training on one machine, and on several nodes."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def train(
    config: str,
    base_model: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    adapter: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.HTML],
) -> None:
    """Train a QLoRA adapter.

    Args:
        config: The `train` section of the recipe as JSON.
        base_model: The base model that fetch made.
        dataset: The dataset that prepare made.

    Returns:
        adapter: The trained adapter, with its tokenizer and training.json.
        record: Copy of the record of adapter.
        metrics: Figures of the training, for comparing runs in the KFP UI.
        curves: Page with the training curves, and answers before and after.
    """
    from tuneline.runtime.step import log_metrics, set_metadata, step
    from tuneline.train import TrainConfig
    from tuneline.train.observe.metrics import artifact_metadata, comparable_metrics
    from tuneline.train.run import run

    with step("train"):
        summary = run(
            TrainConfig.parse(config),
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            curves_path=curves.path,
        )
        summary.copy_to(record.path, directory=adapter.path)
        set_metadata(adapter, **artifact_metadata(summary))
        log_metrics(metrics, comparable_metrics(summary))


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def train_on_nodes(
    config: str,
    nodes: str,
    base_model: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    adapter: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    curves: dsl.Output[dsl.HTML],
) -> None:
    """Train a QLoRA adapter on the nodes of a TrainJob.

    Args:
        config: The `train` section of the recipe as JSON.
        nodes: What the TrainJob asks for, a NodesConfig as JSON.
        base_model: The base model that fetch made.
        dataset: The dataset that prepare made.

    Returns:
        adapter: The trained adapter, with its tokenizer and training.json.
        record: Copy of the record of adapter.
        metrics: Figures of the training, for comparing runs in the KFP UI.
        curves: Page with the training curves, and answers before and after.
    """
    from tuneline.runtime.step import log_metrics, set_metadata, step
    from tuneline.train import TrainConfig
    from tuneline.train.observe.metrics import artifact_metadata, comparable_metrics
    from tuneline.train.trainjob.manifest import NodesConfig
    from tuneline.train.trainjob.run import run_on_nodes

    with step("train"):
        summary = run_on_nodes(
            TrainConfig.parse(config),
            NodesConfig.parse(nodes),
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            adapter_dir=adapter.path,
            curves_path=curves.path,
        )
        summary.copy_to(record.path, directory=adapter.path)
        set_metadata(adapter, **artifact_metadata(summary))
        log_metrics(metrics, comparable_metrics(summary))
