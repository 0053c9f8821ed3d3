"""The KFP components of the step: one conversion, then one task a format."""

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def convert_gguf(merged: dsl.Input[dsl.Model], gguf: dsl.Output[dsl.Model]):
    """Convert the merged model to GGUF in f16, once for all formats."""
    from tuneline.quantize import convert
    from tuneline.step import step

    with step("convert-gguf"):
        record = convert(merged_dir=merged.path, gguf_dir=gguf.path)
        gguf.metadata.update(format=record.format, num_bytes=record.num_bytes)


@dsl.component(base_image=images.GGUF, install_kfp_package=False)
def quantize_gguf(
    format: str,
    config: str,
    merged: dsl.Input[dsl.Model],
    gguf: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
):
    """Make and check one GGUF file; `config` is a QuantizeConfig as JSON."""
    from tuneline.quantize import QuantizeConfig, run
    from tuneline.step import step

    with step("quantize-gguf"):
        record = run(
            QuantizeConfig.parse(config),
            format=format,
            merged_dir=merged.path,
            gguf_dir=gguf.path,
            dataset_dir=dataset.path,
            quantized_dir=quantized.path,
        )
        quantized.metadata.update(
            format=record.format,
            num_bytes=record.num_bytes,
            bits_per_weight=record.bits_per_weight,
        )


@dsl.component(base_image=images.GPTQ, install_kfp_package=False)
def quantize_gptq(
    format: str,
    config: str,
    merged: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    quantized: dsl.Output[dsl.Model],
):
    """Make and check one GPTQ checkpoint; `config` is a QuantizeConfig as JSON."""
    from tuneline.quantize import QuantizeConfig, run
    from tuneline.step import step

    with step("quantize-gptq"):
        record = run(
            QuantizeConfig.parse(config),
            format=format,
            merged_dir=merged.path,
            dataset_dir=dataset.path,
            quantized_dir=quantized.path,
        )
        quantized.metadata.update(
            format=record.format,
            num_bytes=record.num_bytes,
            bits_per_weight=record.bits_per_weight,
            group_size=record.group_size,
        )
