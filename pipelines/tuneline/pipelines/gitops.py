"""Write a pipeline as Kubernetes resources, for a cluster that is managed with GitOps.

Kubeflow Pipelines 2.17 with its Kubernetes-native store accepts Pipeline and PipelineVersion
resources. The name of a PipelineVersion holds a hash of the recipe and of tuneline's version, so
that the same input gives the same name. There is no resource with which users can create recurring
runs; use `tuneline schedule` for them.
"""

import hashlib
from pathlib import Path

from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from tuneline.pipelines.finetune import finetune
from tuneline.recipe import Recipe
from tuneline.version import VERSION


def write_resources(recipe: Recipe, path: Path, *, namespace: str) -> str:
    """Write a Pipeline and a PipelineVersion to `path`; return the name of the version."""
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
