"""Lint checks for the data and the model that a compiled pipeline names.

The rules are listed in `lint.py`. Pipelines that tuneline did not compile have no such parameters.
"""

from typing import Any

from tuneline.errors import RecipeError
from tuneline.pipelines.inputs import ELSEWHERE, is_local
from tuneline.pipelines.lint.required import Problems, mapping
from tuneline.pods import CACHE_PATH
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.datasets import sources_of
from tuneline.runtime.parameter_text import decode_text
from tuneline.runtime.source_names import CLAIMS_PATH, claim_name, is_claim

_PARAMETERS = "root.inputDefinitions.parameters"


def check_data(pipeline: dict[str, Any], platform: dict[str, Any]) -> Problems:
    """Check that the pods can reach what the parameters `dataset` and `base_model` name."""
    parameters = mapping(pipeline, "root", "inputDefinitions", "parameters")
    if not {"base_model", "dataset", "prepare_config"} <= set(parameters):
        return
    for executor, parameter, sources in (
        ("exec-prepare", "dataset", _data_sources(parameters)),
        ("exec-fetch", "base_model", [_value(parameters, "base_model")]),
    ):
        mounts = _mounts(platform, executor)
        path = f"{_PARAMETERS}.{parameter}"
        for source in sources:
            name = claim_name(source)
            if is_local(source, cache_claim=mounts.get(CACHE_PATH)):
                yield path, "local-file", source, ELSEWHERE
            elif is_claim(source) and (name is None or f"{CLAIMS_PATH}/{name}" not in mounts):
                fix = "compile the recipe with this source; claims are mounted when it is compiled"
                yield path, "claim", f"{source} is not mounted", fix


def _data_sources(parameters: dict[str, Any]) -> list[str]:
    try:
        config = PrepareConfig.parse(_value(parameters, "prepare_config"))
        return sources_of(_value(parameters, "dataset"), config)
    except RecipeError:
        return []


def _value(parameters: dict[str, Any], name: str) -> str:
    return decode_text(str(mapping(parameters, name).get("defaultValue", "")))


def _mounts(platform: dict[str, Any], executor: str) -> dict[str, str]:
    """Return the mount paths of an executor and the names of their claims."""
    executors = mapping(platform, "platforms", "kubernetes", "deploymentSpec", "executors")
    mounts = mapping(executors, executor).get("pvcMount")
    return {
        str(mount.get("mountPath")): str(mount.get("constant", ""))
        for mount in (mounts if isinstance(mounts, list) else [])
        if isinstance(mount, dict)
    }
