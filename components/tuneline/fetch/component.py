"""The KFP components of the step."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def look_up_model(source: str, config: str) -> str:
    """Fingerprint the base model, so that KFP's cache notices when its content changes.

    Args:
        source: The recipe's `base_model`: a Hub ID, a directory, a .gguf file or builtin:NAME.
        config: The `fetch` section of the recipe as JSON.

    Returns:
        Output: A text that changes when the model does.
    """
    from tuneline.fetch import FetchConfig
    from tuneline.fetch.fingerprint import fingerprint
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import step

    with step("look-up-model"):
        content = fingerprint(FetchConfig.parse(config), source=decode_text(source))
    return content


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
def fetch(
    source: str,
    config: str,
    fingerprint: str,
    base_model: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
) -> None:
    """Fetch the base model.

    Args:
        source: The recipe's `base_model`: a Hub ID, a directory, a .gguf file or builtin:NAME.
        config: The `fetch` section of the recipe as JSON.
        fingerprint: Output of look_up_model, part of the cache key. For a model on the Hub, it is
            the commit to fetch.

    Returns:
        base_model: The model as safetensors, with its tokenizer.
        record: Copy of the record of base_model.
    """
    from tuneline.fetch import FetchConfig
    from tuneline.fetch.run import run
    from tuneline.runtime.parameter_text import decode_text
    from tuneline.runtime.step import set_metadata, step

    with step("fetch"):
        origin = run(
            FetchConfig.parse(config),
            source=decode_text(source),
            base_model_dir=base_model.path,
            version=fingerprint,
        )
        origin.copy_to(record.path, directory=base_model.path)
        set_metadata(
            base_model,
            source=origin.source,
            revision=origin.revision or "",
            fingerprint=fingerprint,
            architecture=origin.architecture,
            num_parameters=origin.num_parameters,
            sha256=origin.sha256,
        )
