"""The KFP components of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def receive_files(archive: str, files: dsl.Output[dsl.Dataset]) -> None:
    """Write the small files that `tuneline submit` sent with the run.

    Args:
        archive: The files, as `tuneline.prepare.uploads` packs them.

    Returns:
        files: Directory with the files.
    """
    from tuneline.prepare.uploads import unpack
    from tuneline.runtime.step import step

    with step("receive-files"):
        unpack(archive, files.path)


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def look_up_data(source: str, config: str, uploads: dsl.Input[dsl.Dataset] = None) -> str:
    """Fingerprint the dataset, so that KFP's cache notices when its content changes.

    Args:
        source: The recipe's `dataset`, or its `datasets` as JSON.
        config: The `prepare` section of the recipe as JSON.
        uploads: The files that were sent with the run, if there are any.

    Returns:
        Output: A text that changes when the rows do.
    """
    from tuneline.prepare import PrepareConfig
    from tuneline.prepare.fingerprint import fingerprint
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import step

    with step("look-up-data"):
        content = fingerprint(
            PrepareConfig.parse(config),
            source=decode_text(source),
            uploads_dir=uploads.path if uploads else None,
        )
    return content


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def prepare(
    source: str,
    config: str,
    fingerprint: str,
    base_model: dsl.Input[dsl.Model],
    dataset: dsl.Output[dsl.Dataset],
    record: dsl.Output[dsl.Artifact],
    statistics: dsl.Output[dsl.HTML],
    benchmarks: dsl.Input[dsl.Artifact] = None,
    uploads: dsl.Input[dsl.Dataset] = None,
) -> None:
    """Check and tokenise the rows of a dataset, and divide them into its parts.

    Args:
        source: The recipe's `dataset`, or its `datasets` as JSON.
        config: The `prepare` section of the recipe as JSON.
        fingerprint: Output of look_up_data, part of the cache key. It has the commits to read of
            datasets on the Hub.
        base_model: The fetched model, for its tokenizer and chat template.
        benchmarks: Questions of benchmarks, which must not be in the training rows.
        uploads: The files that were sent with the run, if there are any.

    Returns:
        dataset: Token IDs for training and evaluation, and the held-out rows.
        record: Copy of the record of dataset.
        statistics: Page with counts, row lengths, samples and rejected rows.
    """
    from tuneline.runtime.torch_free import hide_torch

    hide_torch()  # Before the next imports, which import transformers.

    from tuneline.prepare import PrepareConfig
    from tuneline.prepare.run import run
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import set_metadata, step

    with step("prepare"):
        manifest = run(
            PrepareConfig.parse(config),
            source=decode_text(source),
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            statistics_path=statistics.path,
            benchmarks_path=benchmarks.path if benchmarks else None,
            uploads_dir=uploads.path if uploads else None,
            version=fingerprint,
        )
        manifest.copy_to(record.path, directory=dataset.path)
        set_metadata(
            dataset,
            fingerprint=fingerprint,
            format=manifest.format,
            num_train_rows=manifest.num_train_rows,
            num_heldout_rows=manifest.num_heldout_rows,
            num_rejected_rows=manifest.num_rejected_rows,
            max_seq_length=manifest.max_seq_length,
            sha256=manifest.sha256,
        )
