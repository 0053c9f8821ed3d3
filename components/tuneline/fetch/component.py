"""The KFP component of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def fetch(source: str, config: str, base_model: dsl.Output[dsl.Model]):
    """Fetch the base model; `config` is a FetchConfig as JSON."""
    from tuneline.fetch import FetchConfig, run
    from tuneline.step import step

    with step("fetch"):
        origin = run(FetchConfig.parse(config), source=source, base_model_dir=base_model.path)
        base_model.metadata.update(
            source=origin.source,
            revision=origin.revision or "",
            architecture=origin.architecture,
            num_parameters=origin.num_parameters,
            sha256=origin.sha256,
        )
