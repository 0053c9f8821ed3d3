"""A recipe: one YAML file that describes a whole run."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from tuneline.errors import RecipeError
from tuneline.evaluate.config import EvaluateConfig
from tuneline.fetch.config import FetchConfig
from tuneline.gate.config import GateConfig
from tuneline.gpu_profiles import GPU_PROFILES, fp8_profiles
from tuneline.merge.config import MergeConfig
from tuneline.notify.config import NotifyConfig
from tuneline.placement import PlacementConfig
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.prepare.datasets import describe, parse, sources_of, to_text
from tuneline.publish.config import PublishConfig
from tuneline.publish.target import Target, check_targets, parse_targets
from tuneline.quantize.config import QuantizeConfig
from tuneline.recipe_file.paths import resolve
from tuneline.recipe_file.source import read_source
from tuneline.records.scores import HELDOUT_PREFIX
from tuneline.runtime.parameter_text import encode_list
from tuneline.runtime.source_names import scheme_of
from tuneline.strict_model import StrictModel
from tuneline.train.batch_size import batch_size
from tuneline.train.config import TrainConfig


class Recipe(StrictModel):
    """One run of the pipeline, from a base model and a dataset to a published model."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,46}[a-z0-9])?$")
    """Name of the recipe's runs and pipeline: lower-case letters, digits, dots and dashes, at most
    48 characters."""
    description: str = ""
    """One-sentence description, shown in KFP, on the report and in the model card."""
    base_model: str
    """Model to fine-tune: a Hub ID, a directory, a .gguf file, claim:NAME/PATH for a path on a
    claim, or builtin:smollm2-135m. Paths in a recipe are relative to the directory of its file."""
    dataset: str | None = None
    """Training data: a Hub ID, a file, a directory, a glob of files, an address in a store (s3://,
    gs://, abfs://, oci://, https://, hf://), claim:NAME/PATH for a path on a claim, or builtin:NAME
    for generated rows, e.g. builtin:support-answers. Give either this key or `datasets`."""
    datasets: list[DatasetConfig] = []
    """Several datasets with weights, instead of `dataset`."""
    publish_to: str | list[str]
    """Where to publish: a Hub repository such as my-org/my-model, dir:PATH for a directory,
    claim:NAME/PATH for a path on a claim, s3://BUCKET/PATH (gs://, abfs://) for a store of files,
    oci://HOST/PATH for a registry of OCI artifacts, mlflow:NAME for a registered model of MLflow,
    or a list of these, which all get the same files. A list may also have model-registry:NAME,
    which registers the address of one of the others in Kubeflow's Model Registry. In a local run,
    PATH of dir:PATH is relative to the directory of the recipe's file."""
    fetch: FetchConfig = FetchConfig()
    prepare: PrepareConfig = PrepareConfig()
    train: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    publish: PublishConfig = PublishConfig()
    placement: PlacementConfig = PlacementConfig()
    notify: list[NotifyConfig] = []
    """Webhooks that get a message when the run ends."""

    @field_validator("base_model")
    @classmethod
    def _is_no_address(cls, value: str) -> str:
        scheme = scheme_of(value)
        if scheme is not None:
            raise ValueError(
                f"'{value}' is an address, but only rows are read from {scheme}://. Write a Hub "
                "ID such as Qwen/Qwen2.5-7B-Instruct, a directory or a .gguf file without "
                f"{scheme}://, or claim:NAME/PATH for a path on a claim of the cluster"
            )
        return value

    @field_validator("publish_to")
    @classmethod
    def _are_targets(cls, value: str | list[str]) -> str | list[str]:
        return check_targets(value)

    @model_validator(mode="after")
    def _names_its_data_once(self) -> Self:
        if (self.dataset is None) == (not self.datasets):
            given = "neither" if self.dataset is None else "both"
            raise ValueError(
                f"{given} of dataset and datasets is given: give one of them, e.g. dataset: "
                "openai/gsm8k or datasets: [{source: a.jsonl}, {source: b.jsonl, weight: 2}]"
            )
        for key in ("subset", "revision") if self.datasets else ():
            if getattr(self.prepare, key) is not None:
                raise ValueError(
                    f"prepare.{key} is given with several datasets: give {key} to the dataset that "
                    "it belongs to, under datasets"
                )
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        unknown = set(self.gate.target_tasks) - set(self.evaluate.tasks)
        if unknown:
            raise ValueError(
                f"gate.target_tasks names {sorted(unknown)}, which evaluate.tasks does not run "
                f"({', '.join(self.evaluate.tasks)})"
            )
        if self.prepare.heldout.max_rows == 0 and any(
            task.startswith(HELDOUT_PREFIX) for task in self.evaluate.tasks
        ):
            raise ValueError(
                "evaluate.tasks needs held-out rows but prepare.heldout.max_rows is 0: set it to "
                "a higher number, or remove the heldout_ tasks"
            )
        profile = self.placement.profile
        gpu = GPU_PROFILES.get(profile)
        if self.train.kernels == "fp8" and gpu is not None and not gpu.runs_fp8:
            has = ".".join(map(str, gpu.capability)) if gpu.capability else "none, being AMD's"
            raise ValueError(
                f"train.kernels is fp8, which needs compute capability 9.0 (Hopper), but the GPU "
                f"of placement.profile {profile} has {has}: set kernels to auto, or the profile to "
                f"{' or '.join(fp8_profiles())}"
            )
        ranks, gpus = self.train.num_ranks, self.placement.num_accelerators
        nodes = self.placement.num_nodes
        if isinstance(ranks, int) and nodes > 1:
            raise ValueError(
                f"train.num_ranks is {ranks} but placement.num_nodes is {nodes}: set num_ranks to "
                "auto, which makes every GPU of every node a rank"
            )
        batch = batch_size(self.train, self.num_ranks)
        if nodes > 1 and not batch.divides:
            raise ValueError(
                f"train.global_batch_size is {batch.global_batch_size}, which is not divisible by "
                f"the {self.num_ranks} ranks ({nodes} nodes x {max(1, gpus)} GPUs): "
                f"{batch.advice}"
            )
        if isinstance(ranks, int) and 0 < gpus < ranks:
            raise ValueError(
                f"train.num_ranks is {ranks} but placement.num_accelerators is {gpus}: set "
                f"num_accelerators to {ranks}, or num_ranks to auto"
            )
        return self

    @property
    def uses_benchmarks(self) -> bool:
        """Whether a benchmark has questions of its own, i.e. is not made of held-out rows."""
        return any(not task.startswith(HELDOUT_PREFIX) for task in self.evaluate.tasks)

    @property
    def data(self) -> str:
        """The dataset or datasets as one text, which the pipeline has as a parameter."""
        return self.dataset if self.dataset is not None else to_text(self.datasets)

    @property
    def data_names(self) -> str:
        """The dataset or datasets in words."""
        return describe(parse(self.data, self.prepare))

    @property
    def data_sources(self) -> list[str]:
        """All sources of rows: of the datasets, of held-out rows and of general rows."""
        return sources_of(self.data, self.prepare)

    @property
    def target(self) -> str:
        """The targets as one text, which the pipeline has as a parameter."""
        return encode_list(self.publish_to)

    @property
    def targets(self) -> list[Target]:
        """The targets of publish, the Hub's first."""
        return parse_targets(self.target)

    @property
    def num_ranks(self) -> int:
        """Number of training processes: train.num_ranks, or one per accelerator of every node."""
        if self.train.num_ranks != "auto":
            return self.train.num_ranks
        return self.placement.num_nodes * max(1, self.placement.num_accelerators)


def load_recipe(
    path: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    base_dir: Path | None = None,
    is_local: bool = False,
    needs_files: bool = False,
) -> Recipe:
    """Read and check a recipe. Its relative paths become absolute.

    Args:
        path: the YAML file.
        overrides: values that replace those of the file, by dotted key, such as
            {"train.max_steps": 60}. Their paths are relative to the working directory.
        base_dir: the directory that the file's paths are relative to; None: that of the file.
        is_local: whether the run is on this machine, so that dir:PATH of publish_to is a path of
            it. In a pod it is not.
        needs_files: whether a path at which nothing is on this machine is an error.

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a valid recipe. The message has a
            line per error, which begins with the file and the number of the line in it.
    """
    source = read_source(Path(path), overrides or {})
    base = (base_dir or source.path.parent).absolute()
    missing = resolve(
        source.values,
        lambda key: Path.cwd() if source.is_overridden(key) else base,
        with_target=is_local,
    )
    recipe, problems = Recipe.check(source.values)
    if needs_files:
        problems += missing
    if recipe is None or problems:
        raise RecipeError(source.explain(problems))
    return recipe
