# mypy: allow-untyped-decorators
"""The KFP components of the step: one conversion to GGUF, then one task per format.

Before training, a task checks that these can succeed. If an importance matrix is used, it is
measured once between conversion and formats.
"""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def check_exports(
    config: str, base_model: dsl.Input[dsl.Model], dataset: dsl.Input[dsl.Dataset]
) -> None:
    """Fail before training if an export of the recipe cannot be made of the base model.

    Args:
        config: The `quantize` section of the recipe as JSON.
        base_model: The base model.
        dataset: The prepared dataset, with its chat template and held-out prompts.
    """
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.early import check_exports as check
    from tuneline.runtime.step import step

    with step("check-exports"):
        check(
            QuantizeConfig.parse(config), base_model_dir=base_model.path, dataset_dir=dataset.path
        )


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def convert_gguf(merged: dsl.Input[dsl.Model], gguf: dsl.Output[dsl.Model]) -> None:
    """Convert the merged model to GGUF in f16, once for all formats.

    Args:
        merged: The merged model.

    Returns:
        gguf: The f16 file.
    """
    from tuneline.quantize.run import convert
    from tuneline.runtime.step import set_metadata, step

    with step("convert-gguf"):
        record = convert(merged_dir=merged.path, gguf_dir=gguf.path)
        set_metadata(gguf, format=record.format, num_bytes=record.num_bytes)


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def measure_importance(
    config: str,
    gguf: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    importance: dsl.Output[dsl.Artifact],
) -> None:
    """Measure the importance matrix, once for all formats.

    Args:
        config: The `quantize` section of the recipe as JSON.
        gguf: The f16 file that convert-gguf made.
        dataset: The prepared dataset; its first training rows are used.

    Returns:
        importance: The importance matrix.
    """
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.gguf.importance import measure_importance as measure
    from tuneline.runtime.step import set_metadata, step

    with step("measure-importance"):
        record = measure(
            QuantizeConfig.parse(config),
            gguf_dir=gguf.path,
            dataset_dir=dataset.path,
            importance_dir=importance.path,
        )
        set_metadata(importance, num_rows=record.num_rows, num_tokens=record.num_tokens)


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def quantize_gguf(
    format: str,
    config: str,
    merged: dsl.Input[dsl.Model],
    gguf: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
    importance: dsl.Input[dsl.Artifact] = None,
) -> None:
    """Make and check one GGUF file.

    Args:
        format: The name of the format, e.g. q4_k_m.
        config: The `quantize` section of the recipe as JSON.
        merged: The merged model, with which the file is compared.
        gguf: The f16 file that convert-gguf made.
        dataset: The prepared dataset; its held-out rows are the check's prompts.
        importance: The importance matrix; without it, all inputs of a layer weigh equally.

    Returns:
        quantized: The GGUF file and its Modelfile.
        record: Copy of the record of quantized.
    """
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.run import run
    from tuneline.runtime.step import set_metadata, step

    with step("quantize-gguf", format):
        export = run(
            QuantizeConfig.parse(config),
            format=format,
            merged_dir=merged.path,
            gguf_dir=gguf.path,
            importance_dir=importance.path if importance else None,
            dataset_dir=dataset.path,
            quantized_dir=quantized.path,
        )
        export.copy_to(record.path, directory=quantized.path)
        set_metadata(
            quantized,
            format=export.format,
            num_bytes=export.num_bytes,
            bits_per_weight=export.bits_per_weight,
        )


@dsl.component(base_image=images.GPTQ, install_kfp_package=False)
def quantize_gptq(
    format: str,
    config: str,
    merged: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
) -> None:
    """Make and check one GPTQ checkpoint.

    Args:
        format: The name of the format, e.g. gptq-4bit.
        config: The `quantize` section of the recipe as JSON.
        merged: The merged model, with which the checkpoint is compared.
        dataset: The prepared dataset; its training rows calibrate the rounding.

    Returns:
        quantized: The checkpoint.
        record: Copy of the record of quantized.
    """
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.run import run
    from tuneline.runtime.step import set_metadata, step

    with step("quantize-gptq", format):
        export = run(
            QuantizeConfig.parse(config),
            format=format,
            merged_dir=merged.path,
            dataset_dir=dataset.path,
            quantized_dir=quantized.path,
        )
        export.copy_to(record.path, directory=quantized.path)
        set_metadata(
            quantized,
            format=export.format,
            num_bytes=export.num_bytes,
            bits_per_weight=export.bits_per_weight,
            group_size=export.group_size,
        )


@dsl.component(base_image=images.GPTQ, install_kfp_package=False)
def quantize_awq(
    format: str,
    config: str,
    merged: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
) -> None:
    """Make and check one AWQ checkpoint.

    Args:
        format: The name of the format, awq.
        config: The `quantize` section of the recipe as JSON.
        merged: The merged model, with which the checkpoint is compared.
        dataset: The prepared dataset; its training rows calibrate the scales.

    Returns:
        quantized: The checkpoint.
        record: Copy of the record of quantized.
    """
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.run import run
    from tuneline.runtime.step import set_metadata, step

    with step("quantize-awq", format):
        export = run(
            QuantizeConfig.parse(config),
            format=format,
            merged_dir=merged.path,
            dataset_dir=dataset.path,
            quantized_dir=quantized.path,
        )
        export.copy_to(record.path, directory=quantized.path)
        set_metadata(
            quantized,
            format=export.format,
            num_bytes=export.num_bytes,
            bits_per_weight=export.bits_per_weight,
            group_size=export.group_size,
        )


@dsl.component(base_image=images.GPTQ, install_kfp_package=False)
def quantize_fp8(
    format: str,
    config: str,
    merged: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
) -> None:
    """Make and check one FP8 checkpoint.

    Args:
        format: The name of the format, fp8.
        config: The `quantize` section of the recipe as JSON.
        merged: The merged model, with which the checkpoint is compared.
        dataset: The prepared dataset; its held-out rows are the check's prompts.

    Returns:
        quantized: The checkpoint.
        record: Copy of the record of quantized.
    """
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.run import run
    from tuneline.runtime.step import set_metadata, step

    with step("quantize-fp8", format):
        export = run(
            QuantizeConfig.parse(config),
            format=format,
            merged_dir=merged.path,
            dataset_dir=dataset.path,
            quantized_dir=quantized.path,
        )
        export.copy_to(record.path, directory=quantized.path)
        set_metadata(
            quantized,
            format=export.format,
            num_bytes=export.num_bytes,
            bits_per_weight=export.bits_per_weight,
        )
