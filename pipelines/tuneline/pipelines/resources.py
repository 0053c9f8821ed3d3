"""Write a pipeline as resources of Kubernetes, for a cluster that is kept by GitOps.

Kubeflow Pipelines 2.17 with its Kubernetes-native store takes a Pipeline and PipelineVersions. A
version is named after its content: the same recipe gives the same version, another one a new one.
Recurring runs have no such resource that people may write; `tuneline schedule` makes them.
"""

import hashlib
from pathlib import Path

import yaml
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from tuneline.pipelines.finetune import finetune
from tuneline.recipe import Recipe


def write_resources(recipe: Recipe, path: Path, *, namespace: str) -> str:
    """Write a Pipeline and a PipelineVersion to `path`, and return the version's name."""
    pipeline = finetune(recipe)
    compiler.Compiler().compile(pipeline, str(path))
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    name = documents[0]["pipelineInfo"]["name"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    version = f"{name}-{digest}"
    compiler.Compiler().compile(
        pipeline,
        str(path),
        kubernetes_manifest_options=KubernetesManifestOptions(
            pipeline_name=name,
            pipeline_version_name=version,
            namespace=namespace,
            include_pipeline_manifest=True,
        ),
        kubernetes_manifest_format=True,
    )
    return version
