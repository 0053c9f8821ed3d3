"""The KFP components of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def look_up_model(source: str, config: str) -> str:
    """Say what stands behind the name now; `config` is a FetchConfig as JSON."""
    from tuneline.fetch import FetchConfig
    from tuneline.fetch.fingerprint import fingerprint
    from tuneline.runtime.step import step

    with step("look-up-model"):
        found = fingerprint(FetchConfig.parse(config), source=source)
    return found


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def fetch(source: str, config: str, fingerprint: str, base_model: dsl.Output[dsl.Model]):
    """Fetch the base model; `config` is a FetchConfig as JSON, `fingerprint` is for the cache."""
    from tuneline.fetch import FetchConfig
    from tuneline.fetch.run import run
    from tuneline.runtime.step import step

    with step("fetch"):
        origin = run(FetchConfig.parse(config), source=source, base_model_dir=base_model.path)
        base_model.metadata.update(
            source=origin.source,
            revision=origin.revision or "",
            fingerprint=fingerprint,
            architecture=origin.architecture,
            num_parameters=origin.num_parameters,
            sha256=origin.sha256,
        )
