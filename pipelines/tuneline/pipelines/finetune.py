"""The DAG: which step's artifacts go where. Wiring only.

    fetch -> prepare -> train -> merge -> convert -> quantize (a task a format) -> gate -> publish
      `---------> evaluate the base           `---> evaluate the tuned ----'  `--> report

The steps' configs are pipeline parameters, one a step and not one for all: a task's cache key is
its inputs, so that a new learning rate does not prepare the data again. They are JSON strings
because KFP turns the integers of a struct into floats.

Formats and accelerators shape the graph, so they are read when it is built; models, data, target
and every step's config can be changed for each run of the compiled file.
"""

from collections.abc import Callable

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from tuneline.diagnose.component import diagnose
from tuneline.evaluate.component import evaluate
from tuneline.gate.component import gate
from tuneline.merge.component import merge
from tuneline.prepare.component import prepare
from tuneline.publish.component import publish
from tuneline.quantize.component import convert_gguf, quantize_gguf, quantize_gptq
from tuneline.report.component import report
from tuneline.train.component import train

from tuneline.fetch.component import fetch
from tuneline.pipelines.placement import place
from tuneline.recipe import Recipe


def finetune(recipe: Recipe) -> BaseComponent:
    """Build the pipeline of a recipe, ready to compile or to run locally."""
    gguf_formats = list(recipe.quantize.gguf)
    gptq_formats = list(recipe.quantize.gptq)

    def placed(component: Callable[..., dsl.PipelineTask], **arguments: object) -> dsl.PipelineTask:
        task = component(**arguments)
        return place(task, component.name, recipe.placement)  # type: ignore[attr-defined]

    @dsl.pipeline(name=f"tuneline-{recipe.name}".replace(".", "-"), description=recipe.description)
    def line(
        base_model: str = recipe.base_model,
        dataset: str = recipe.dataset,
        publish_to: str = recipe.publish_to,
        fetch_config: str = recipe.fetch.model_dump_json(),
        prepare_config: str = recipe.prepare.model_dump_json(),
        train_config: str = recipe.train.model_dump_json(),
        merge_config: str = recipe.merge.model_dump_json(),
        quantize_config: str = recipe.quantize.model_dump_json(),
        evaluate_config: str = recipe.evaluate.model_dump_json(),
        gate_config: str = recipe.gate.model_dump_json(),
        publish_config: str = recipe.publish.model_dump_json(),
        recipe_json: str = recipe.model_dump_json(),
    ):
        goodbye = placed(diagnose).set_caching_options(False)
        with dsl.ExitHandler(goodbye, name="line"):
            fetched = placed(fetch, source=base_model, config=fetch_config)
            base = fetched.outputs["base_model"]
            prepared = placed(prepare, source=dataset, config=prepare_config, base_model=base)
            data = prepared.outputs["dataset"]
            base_scores = placed(
                evaluate, label="base", config=evaluate_config, model=base, dataset=data
            ).set_display_name("evaluate base")
            trained = placed(train, config=train_config, base_model=base, dataset=data)
            adapter = trained.outputs["adapter"]
            merged = placed(
                merge, config=merge_config, base_model=base, adapter=adapter, dataset=data
            ).outputs["merged"]
            tuned_scores = placed(
                evaluate, label="tuned", config=evaluate_config, model=merged, dataset=data
            ).set_display_name("evaluate tuned")

            exports = {}
            if gguf_formats:
                f16 = placed(convert_gguf, merged=merged).outputs["gguf"]
                with dsl.ParallelFor(gguf_formats, name="gguf") as gguf_format:
                    gguf = placed(
                        quantize_gguf,
                        format=gguf_format,
                        config=quantize_config,
                        merged=merged,
                        gguf=f16,
                        dataset=data,
                    )
                exports["gguf"] = dsl.Collected(gguf.outputs["quantized"])
            if gptq_formats:
                with dsl.ParallelFor(gptq_formats, name="gptq") as gptq_format:
                    gptq = placed(
                        quantize_gptq,
                        format=gptq_format,
                        config=quantize_config,
                        merged=merged,
                        dataset=data,
                    )
                exports["gptq"] = dsl.Collected(gptq.outputs["quantized"])

            gated = placed(
                gate,
                config=gate_config,
                base_scores=base_scores.outputs["scores"],
                tuned_scores=tuned_scores.outputs["scores"],
            )
            everything = {
                "recipe": recipe_json,
                "base_model": base,
                "dataset": data,
                "adapter": adapter,
                "merged": merged,
                "base_scores": base_scores.outputs["scores"],
                "tuned_scores": tuned_scores.outputs["scores"],
                "decision": gated.outputs["decision"],
                **exports,
            }
            placed(report, **everything).set_caching_options(False)
            with dsl.If(gated.outputs["Output"] == "promote", name="promoted"):
                placed(
                    publish, target=publish_to, config=publish_config, **everything
                ).set_caching_options(False)

    return line
