"""The KFP components of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def look_up_data(source: str, config: str) -> str:
    """Say what stands behind the name now; `config` is a PrepareConfig as JSON."""
    from tuneline.prepare import PrepareConfig
    from tuneline.prepare.fingerprint import fingerprint
    from tuneline.runtime.step import step

    with step("look-up-data"):
        found = fingerprint(PrepareConfig.parse(config), source=source)
    return found


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def prepare(
    source: str,
    config: str,
    fingerprint: str,
    base_model: dsl.Input[dsl.Model],
    dataset: dsl.Output[dsl.Dataset],
    statistics: dsl.Output[dsl.HTML],
):
    """Check and tokenise the rows; `config` is a PrepareConfig as JSON."""
    from tuneline.prepare import PrepareConfig
    from tuneline.prepare.run import run
    from tuneline.runtime.step import step

    with step("prepare"):
        manifest = run(
            PrepareConfig.parse(config),
            source=source,
            base_model_dir=base_model.path,
            dataset_dir=dataset.path,
            statistics_path=statistics.path,
        )
        dataset.metadata.update(
            fingerprint=fingerprint,
            format=manifest.format,
            num_train_rows=manifest.num_train_rows,
            num_heldout_rows=manifest.num_heldout_rows,
            num_rejected_rows=manifest.num_rejected_rows,
            max_seq_length=manifest.max_seq_length,
            sha256=manifest.sha256,
        )
