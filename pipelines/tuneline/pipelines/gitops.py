"""Write a pipeline as resources of Kubernetes, for a cluster that is kept by GitOps.

Kubeflow Pipelines 2.17 with its Kubernetes-native store takes a Pipeline and PipelineVersions. A
version is named after the recipe and tuneline's own version: the same give the same name.
Recurring runs have no such resource that people may write; `tuneline schedule` makes them.
"""

import hashlib
from pathlib import Path

from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from tuneline.pipelines.finetune import finetune
from tuneline.recipe import Recipe
from tuneline.version import VERSION


def write_resources(recipe: Recipe, path: Path, *, namespace: str) -> str:
    """Write a Pipeline and a PipelineVersion to `path`, and return the version's name."""
    pipeline = finetune(recipe)
    name = pipeline.name
    content = f"{VERSION}\n{recipe.model_dump_json()}"
    version = f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    options = KubernetesManifestOptions(
        pipeline_name=name,
        pipeline_version_name=version,
        namespace=namespace,
        include_pipeline_manifest=True,
    )
    compiler.Compiler().compile(
        pipeline,
        str(path),
        kubernetes_manifest_options=options,
        kubernetes_manifest_format=True,
    )
    return version
