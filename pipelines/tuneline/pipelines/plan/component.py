"""The KFP component of the plan.

Its outputs are a NamedTuple in functional form, because KFP runs the function without its module.
"""

from typing import List, NamedTuple

from kfp import dsl

from tuneline import images


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def plan(
    recipe: str,
    base_model: str,
    learning_rate: float,
    num_train_epochs: float,
    max_steps: int,
    lora_r: int,
    lora_alpha: int,
    max_seq_length: int,
    gguf_formats: List[str],
    gptq_formats: List[str],
    awq_formats: List[str],
    fp8_formats: List[str],
    train_config: str,
    prepare_config: str,
    quantize_config: str,
    summary: dsl.Output[dsl.Markdown],
    recipe_sha256: str = "",
) -> NamedTuple("Configs", [("train", str), ("prepare", str), ("quantize", str)]):  # type: ignore[valid-type]
    """Put together the configs of a run, and fail before a GPU is requested if it cannot work.

    Args:
        recipe: The recipe that the pipeline was compiled from, as JSON.
        base_model: Base model of this run.
        learning_rate: `train.learning_rate`; 0 is auto.
        num_train_epochs: `train.num_train_epochs`.
        max_steps: `train.max_steps`; 0 is null.
        lora_r: `train.lora.r`.
        lora_alpha: `train.lora.lora_alpha`.
        max_seq_length: `prepare.max_seq_length`; 0 is auto.
        gguf_formats: `quantize.gguf`.
        gptq_formats: `quantize.gptq`.
        awq_formats: `quantize.awq`.
        fp8_formats: `quantize.fp8`.
        train_config: The rest of the section `train` of this run, as JSON.
        prepare_config: The rest of the section `prepare` of this run, as JSON.
        quantize_config: The rest of the section `quantize` of this run, as JSON.
        recipe_sha256: SHA-256 of the recipe that the pipeline was compiled from. Default: any
            recipe is accepted.

    Returns:
        summary: Markdown page with all checks.
        train: The whole section `train` of this run, as JSON.
        prepare: The whole section `prepare` of this run, as JSON.
        quantize: The whole section `quantize` of this run, as JSON.
    """
    from typing import NamedTuple

    from tuneline.pipelines.plan.run import run
    from tuneline.runtime.parameter_text import decode_text, to_json
    from tuneline.runtime.step import step

    with step("plan"):
        planned = run(
            recipe,
            recipe_sha256=recipe_sha256,
            base_model=decode_text(base_model),
            typed={
                "learning_rate": learning_rate,
                "num_train_epochs": num_train_epochs,
                "max_steps": max_steps,
                "lora_r": lora_r,
                "lora_alpha": lora_alpha,
                "max_seq_length": max_seq_length,
                "gguf_formats": gguf_formats,
                "gptq_formats": gptq_formats,
                "awq_formats": awq_formats,
                "fp8_formats": fp8_formats,
            },
            train=train_config,
            prepare=prepare_config,
            quantize=quantize_config,
            summary_path=summary.path,
            store=summary.uri,
        ).recipe
    configs = (to_json(each) for each in (planned.train, planned.prepare, planned.quantize))
    Configs = NamedTuple("Configs", [("train", str), ("prepare", str), ("quantize", str)])
    return Configs(*configs)
