"""The pipeline's graph: the steps, and the artifacts that each step passes on to later steps.

                        .-> evaluate base ---------------------------.
                        |                                            v
    plan -> fetch -> prepare -> train -> merge -> evaluate tuned -> gate -> report, publish
                                           |                         ^
                                           `-> export ---------------'
                                               (convert, quantize)

The gate reads the two scores, the records of the merged model and of the exports, and what a small
task finds of earlier runs: the scores of the model published last, and how many models were
measured on the same questions. The report reads the records of the earlier steps, and publish, if
the gate promotes the model, the artifacts that it uploads: of the exports, those that the gate does
not hold.

Before fetch and before prepare, a small task looks up the fingerprint of what the model's or the
dataset's name refers to now. These tasks are never cached, and fetch and prepare take the
fingerprints as inputs. A scheduled run of unchanged sources therefore takes every step up to the
gate from the cache, and a run of changed sources trains again. Without the fingerprint, a changed
source with an unchanged name would be taken from the cache.

Between prepare and train, a small task checks on the base model that the exports which the recipe
asks for can be made, because training takes longest.

If the recipe evaluates tasks of lm-eval, a small task collects their questions, and prepare
searches the training rows for them.

The values that people change between runs are typed parameters of their own (parameters.py). The
rest of each step's config is a JSON string, because KFP turns the integers of a struct into floats.
The plan puts the two together, and its outputs are the steps' configs. A config is a separate input
of its step, because the inputs of a task are its cache key: a new learning rate does not cause the
data to be prepared again.

KFP can give a task a cache key of one's own, but that key replaces the task's inputs: a run with
another dataset would get the model of the first. Therefore no task has one.

Small files of the machine that submits a run travel as an argument of the task receive-files, which
only such runs have; it hands them to prepare as an artifact.

Kinds of exports, nodes, accelerators, claims and the importance matrix shape the graph, so they are
fixed when it is built. Models, data, target, the formats of a kind and every step's config can be
changed for each run of the compiled file. The recipe that the file was compiled from is a parameter
too, so that the records of a run can say which values differ; the plan refuses another one. It is
no constant, because KFP would copy it into many nodes of the workflow, whose size is limited. Texts
are written so that they reach the steps unchanged (runtime/parameter_text.py).
"""

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from tuneline.diagnose.component import diagnose
from tuneline.errors import UserError
from tuneline.evaluate.component import collect_benchmarks, evaluate
from tuneline.fetch.component import fetch, look_up_model
from tuneline.gate.component import gate
from tuneline.kinds import ExportKind
from tuneline.merge.component import merge
from tuneline.pipelines.inputs import claims_of
from tuneline.pipelines.parameters import section_json, sha256_of, typed_values
from tuneline.pipelines.placement import nodes_config, place
from tuneline.pipelines.plan.component import plan
from tuneline.prepare.component import look_up_data, prepare, receive_files
from tuneline.publish.component import look_up_published, publish
from tuneline.quantize.component import (
    check_exports,
    convert_gguf,
    measure_importance,
    quantize_awq,
    quantize_fp8,
    quantize_gguf,
    quantize_gptq,
)
from tuneline.quantize.config import QuantizeConfig
from tuneline.recipe import Recipe
from tuneline.report.component import report
from tuneline.runtime.parameter_text import encode_text, to_json
from tuneline.steps import EVERY_STEP, STEPS
from tuneline.train.component import train, train_on_nodes

VERSIONS_VARIABLE = "TUNELINE_VERSIONS"
"""Environment variable that no step reads: KFP's local cache key holds a task's environment."""


def finetune(
    recipe: Recipe,
    *,
    on_cluster: bool = True,
    archive: str | None = None,
    run_name: str = dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
    run_id: str = dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    uncached: Collection[str] = (),
    versions_of: Callable[[str], str] | None = None,
) -> BaseComponent:
    """Build the pipeline of a recipe, ready to compile or to run locally.

    Args:
        recipe: the recipe.
        on_cluster: whether to apply the recipe's placement. It is left out of local runs, because a
            local runner applies only the retries: a wrong name would fail after minutes.
        archive: files that are sent with the run, as `tuneline.prepare.uploads` packs them; None:
            there are none.
        run_name: name of the run. Default: what KFP replaces by the run's name.
        run_id: ID of the run. Default: what KFP replaces by the run's ID.
        uncached: names of steps that are not taken from the cache of earlier runs, or EVERY_STEP.
            The steps after them get other inputs, so they run again too.
        versions_of: for a local run without images, a function that returns the versions of the
            packages of a dependency set. They become a part of the cache key of each task, as the
            image's name is elsewhere. None: only the image's name.

    Raises:
        UserError: the run has no step of a name in `uncached`.
    """
    steps: set[str] = set()
    notified = {webhook.webhook for webhook in recipe.notify}

    def placed(function: Callable[..., Any], **arguments: object) -> dsl.PipelineTask:
        # By its type, kfp's decorator returns the function, but it returns a component.
        component = cast(BaseComponent, function)
        task = component(**arguments)
        steps.add(component.name)
        if component.name in uncached or EVERY_STEP in uncached:
            task.set_caching_options(False)
        if versions_of is not None:
            task.set_env_variable(VERSIONS_VARIABLE, versions_of(STEPS[component.name].image))
        if not on_cluster:
            return task
        claims = claims_of(recipe, component.name)
        return place(task, component.name, recipe.placement, claims=claims, notified=notified)

    on_nodes = None
    if on_cluster and recipe.placement.num_nodes > 1:
        on_nodes = to_json(nodes_config(recipe.placement))
    typed = typed_values(recipe)
    recipe_text = to_json(recipe)
    exporters: dict[str, BaseComponent] = {
        kind: make_exporter(recipe.quantize, placed)
        for kind, make_exporter in EXPORTERS.items()
        if getattr(recipe.quantize, kind)
    }

    @dsl.pipeline(name=f"tuneline-{recipe.name}".replace(".", "-"), description=recipe.description)
    def line(
        base_model: str = encode_text(recipe.base_model),
        dataset: str = encode_text(recipe.data),
        publish_to: str = encode_text(recipe.target),
        learning_rate: float = typed["learning_rate"],
        num_train_epochs: float = typed["num_train_epochs"],
        max_steps: int = typed["max_steps"],
        lora_r: int = typed["lora_r"],
        lora_alpha: int = typed["lora_alpha"],
        max_seq_length: int = typed["max_seq_length"],
        gguf_formats: list[str] = typed["gguf_formats"],
        gptq_formats: list[str] = typed["gptq_formats"],
        awq_formats: list[str] = typed["awq_formats"],
        fp8_formats: list[str] = typed["fp8_formats"],
        fetch_config: str = to_json(recipe.fetch),
        prepare_config: str = section_json(recipe, "prepare"),
        train_config: str = section_json(recipe, "train"),
        merge_config: str = to_json(recipe.merge),
        quantize_config: str = section_json(recipe, "quantize"),
        evaluate_config: str = to_json(recipe.evaluate),
        gate_config: str = to_json(recipe.gate),
        publish_config: str = to_json(recipe.publish),
        recipe_json: str = recipe_text,
    ) -> None:
        """Build the graph.

        Args:
            base_model: Model to fine-tune: a Hub ID, a directory, a .gguf file or builtin:NAME.
            dataset: Training data: a Hub ID, a path, an address in a store, claim:NAME/PATH or
                builtin:NAME; several datasets are a JSON list.
            publish_to: Where to publish: a Hub repository, dir:PATH, claim:NAME/PATH or an address
                in a store; several targets are a JSON list.
            learning_rate: Highest learning rate of the schedule, e.g. 0.0002. 0 chooses it by the
                method and the number of rows.
            num_train_epochs: Passes over the training data; may be a fraction. Has no effect if
                max_steps is not 0.
            max_steps: Optimizer steps of the run. 0 trains for num_train_epochs.
            lora_r: Rank of the adapter, 1 to 1024.
            lora_alpha: Scale of the adapter, whose update is multiplied by lora_alpha / lora_r.
            max_seq_length: Maximum length of an example in tokens, at least 8; longer ones are
                truncated. 0 takes the length that 99 % of the rows fit in.
            gguf_formats: GGUF files to make, e.g. ["q4_k_m", "q8_0"]. Empty only if the recipe
                makes none.
            gptq_formats: GPTQ checkpoints to make, e.g. ["gptq-4bit"]. Empty only if the recipe
                makes none.
            awq_formats: AWQ checkpoints to make: ["awq"]. Empty only if the recipe makes none.
            fp8_formats: FP8 checkpoints to make: ["fp8"]. Empty only if the recipe makes none.
            fetch_config: The section fetch of the recipe as JSON.
            prepare_config: The section prepare as JSON, without max_seq_length.
            train_config: The section train as JSON, without learning_rate, num_train_epochs,
                max_steps, lora.r and lora.lora_alpha.
            merge_config: The section merge as JSON.
            quantize_config: The section quantize as JSON, without gguf, gptq, awq and fp8.
            evaluate_config: The section evaluate as JSON.
            gate_config: The section gate as JSON.
            publish_config: The section publish as JSON.
            recipe_json: The recipe that the pipeline was compiled from, for the records of the run.
                A run with another one is refused: change the parameters above.
        """
        goodbye = placed(
            diagnose,
            notify=json.dumps([webhook.model_dump(mode="json") for webhook in recipe.notify]),
            run_name=run_name,
            recipe_name=recipe.name,
            target=publish_to,
        ).set_caching_options(False)
        with dsl.ExitHandler(goodbye, name="line"):
            planned = placed(
                plan,
                recipe=recipe_json,
                recipe_sha256=sha256_of(recipe_text),
                base_model=base_model,
                learning_rate=learning_rate,
                num_train_epochs=num_train_epochs,
                max_steps=max_steps,
                lora_r=lora_r,
                lora_alpha=lora_alpha,
                max_seq_length=max_seq_length,
                gguf_formats=gguf_formats,
                gptq_formats=gptq_formats,
                awq_formats=awq_formats,
                fp8_formats=fp8_formats,
                train_config=train_config,
                prepare_config=prepare_config,
                quantize_config=quantize_config,
            ).set_caching_options(False)
            configs = planned.outputs
            formats = {
                "gguf": gguf_formats,
                "gptq": gptq_formats,
                "awq": awq_formats,
                "fp8": fp8_formats,
            }
            model_now = placed(look_up_model, source=base_model, config=fetch_config)
            files = {}
            if archive is not None:
                received = placed(receive_files, archive=archive)
                received.after(planned)
                files["uploads"] = received.outputs["files"]
            data_now = placed(look_up_data, source=dataset, config=configs["prepare"], **files)
            model_now.after(planned)
            data_now.after(planned)
            fetched = placed(
                fetch,
                source=base_model,
                config=fetch_config,
                fingerprint=model_now.set_caching_options(False).output,
            )
            base = fetched.outputs["base_model"]
            searched = {}
            if recipe.uses_benchmarks:
                collected = placed(collect_benchmarks, config=evaluate_config).after(planned)
                searched["benchmarks"] = collected.outputs["questions"]
            prepared = placed(
                prepare,
                source=dataset,
                config=configs["prepare"],
                fingerprint=data_now.set_caching_options(False).output,
                base_model=base,
                **searched,
                **files,
            )
            data = prepared.outputs["dataset"]
            base_scores = placed(
                evaluate, label="base", config=evaluate_config, model=base, dataset=data
            ).set_display_name("evaluate base")
            if on_nodes is not None:
                trained = placed(
                    train_on_nodes,
                    config=configs["train"],
                    nodes=on_nodes,
                    base_model=base,
                    dataset=data,
                ).set_display_name("train")
            else:
                trained = placed(train, config=configs["train"], base_model=base, dataset=data)
            if exporters:
                checked = placed(
                    check_exports, config=configs["quantize"], base_model=base, dataset=data
                )
                trained.after(checked)
            merged = placed(
                merge,
                config=merge_config,
                base_model=base,
                adapter=trained.outputs["adapter"],
                dataset=data,
            )
            model = merged.outputs["merged"]
            tuned_scores = placed(
                evaluate, label="tuned", config=evaluate_config, model=model, dataset=data
            ).set_display_name("evaluate tuned")

            exported = {
                kind: exporter(
                    formats=formats[kind], config=configs["quantize"], merged=model, dataset=data
                )
                for kind, exporter in exporters.items()
            }
            if uncached:
                # These tasks are pipelines, whose tasks KFP then looks up one by one.
                for exporting in exported.values():
                    exporting.set_caching_options(False)

            scores = {
                "base_scores": base_scores.outputs["scores"],
                "tuned_scores": tuned_scores.outputs["scores"],
            }
            # Uncached: the target may have another model than in the last run.
            published_before = placed(
                look_up_published, target=publish_to, config=publish_config, recipe=recipe_json
            ).set_caching_options(False)
            published_before.after(planned)
            export_records = {kind: task.outputs["records"] for kind, task in exported.items()}
            gated = placed(
                gate,
                config=gate_config,
                **scores,
                merged=merged.outputs["record"],
                earlier=published_before.outputs["earlier"],
                **export_records,
            )
            everything = {
                "recipe": recipe_json,
                "quantize_config": configs["quantize"],
                "base_model": fetched.outputs["record"],
                "dataset": prepared.outputs["record"],
                "decision": gated.outputs["decision"],
            }
            placed(
                report,
                **everything,
                **scores,
                run_name=run_name,
                target=publish_to,
                publish_config=publish_config,
                adapter=trained.outputs["record"],
                merged=merged.outputs["record"],
                **export_records,
            ).set_caching_options(False)
            placed(
                publish,
                **everything,
                run_id=run_id,
                target=publish_to,
                config=publish_config,
                adapter=trained.outputs["adapter"],
                merged=model,
                **{kind: task.outputs["exports"] for kind, task in exported.items()},
            ).set_caching_options(False)

    if unknown := sorted(set(uncached) - steps - {EVERY_STEP}):
        raise UserError(
            f"--no-cache names {', '.join(unknown)}, but this run has no such step. Name one of "
            f"{', '.join(sorted(steps))}, or {EVERY_STEP}"
        )
    publish_only_if_promoted(cast(BaseComponent, line))
    return cast(BaseComponent, line)


def publish_only_if_promoted(pipeline: BaseComponent) -> None:
    """Put the condition that the gate promotes the model on the task `publish`.

    The SDK's way is dsl.If, which makes a DAG of the tasks in it, and KFP 2.17 passes only the
    first item of a list of artifacts into a DAG: publish would get one export. The specification
    and both runners know the condition of a single task, for which the SDK has no call. The name
    of the input is the SDK's own for the output of a task, because the local runner looks it up.
    """
    verdict = "pipelinechannel--gate-Output"
    (dag,) = (
        component.dag
        for component in pipeline.pipeline_spec.components.values()
        if "publish" in component.dag.tasks
    )
    task = dag.tasks["publish"]
    source = task.inputs.parameters[verdict].task_output_parameter
    source.producer_task, source.output_parameter_key = "gate", "Output"
    task.trigger_policy.condition = f"inputs.parameter_values['{verdict}'] == 'promote'"


class Exports(NamedTuple):
    """Outputs of a pipeline that makes the exports of one kind."""

    exports: list[dsl.Model]
    records: list[dsl.Artifact]
    """A copy of the record of each export."""


Exporter = Callable[[QuantizeConfig, Callable[..., dsl.PipelineTask]], BaseComponent]


# Each kind of export is a nested pipeline, which KFP's UI shows as one node.
def _export_gguf(
    quantize: QuantizeConfig, placed: Callable[..., dsl.PipelineTask]
) -> BaseComponent:
    @dsl.pipeline(name="export-gguf", description="One GGUF file per format, from one conversion.")
    def export_gguf(
        formats: list[str],
        config: str,
        merged: dsl.Input[dsl.Model],
        dataset: dsl.Input[dsl.Dataset],
    ) -> Exports:
        f16 = placed(convert_gguf, merged=merged).outputs["gguf"]
        weighed = {}
        if quantize.num_importance_rows > 0:
            measured = placed(measure_importance, config=config, gguf=f16, dataset=dataset)
            weighed["importance"] = measured.outputs["importance"]
        with dsl.ParallelFor(formats, name="formats") as item:
            task = placed(
                quantize_gguf,
                format=item,
                config=config,
                merged=merged,
                gguf=f16,
                dataset=dataset,
                **weighed,
            )
        return _collected(task)

    return cast(BaseComponent, export_gguf)


def _export_checkpoints(kind: ExportKind, quantize: Callable[..., Any]) -> Exporter:
    """Return a function that makes the nested pipeline of a kind of checkpoint.

    Args:
        kind: the kind.
        quantize: the component that makes one checkpoint.
    """

    def make(_: QuantizeConfig, placed: Callable[..., dsl.PipelineTask]) -> BaseComponent:
        @dsl.pipeline(
            name=f"export-{kind}", description=f"One {kind.upper()} checkpoint per format."
        )
        def export_checkpoints(
            formats: list[str],
            config: str,
            merged: dsl.Input[dsl.Model],
            dataset: dsl.Input[dsl.Dataset],
        ) -> Exports:
            with dsl.ParallelFor(formats, name="formats") as item:
                task = placed(quantize, format=item, config=config, merged=merged, dataset=dataset)
            return _collected(task)

        return cast(BaseComponent, export_checkpoints)

    return make


def _collected(task: dsl.PipelineTask) -> Exports:
    """Return the exports of a loop's task, and their records, as outputs of a pipeline."""
    return Exports(
        exports=cast(list[dsl.Model], dsl.Collected(task.outputs["quantized"])),
        records=cast(list[dsl.Artifact], dsl.Collected(task.outputs["record"])),
    )


EXPORTERS: dict[ExportKind, Exporter] = {
    "gguf": _export_gguf,
    "gptq": _export_checkpoints("gptq", quantize_gptq),
    "awq": _export_checkpoints("awq", quantize_awq),
    "fp8": _export_checkpoints("fp8", quantize_fp8),
}
"""Functions that make the nested pipeline of each kind of export. Gate, report and publish have an
input per kind, with the same name."""
