"""Check that an environment can run the steps of one image: `python -m tuneline.selfcheck SET`.

The build of every image ends with this check, so the build of an image that lacks a package fails.
Run in a pod, the check also shows whether the pod's user has write access to the directories that
the steps write to.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from tuneline.runtime.environment import check_versions
from tuneline.steps import IMAGE_SETS, STEPS, steps_in

CACHE_VARIABLES = ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR")
"""Environment variables that name directories to which a step must be able to write."""


def check(image_set: str) -> list[str]:
    """Check the environment for a dependency set; return one line per check that passed.

    Raises:
        Exception: the exception of the first check that failed.
    """
    lines = [f"user {os.getuid()}:{os.getgid()}, Python {sys.version.split()[0]}"]
    for variable in CACHE_VARIABLES:
        directory = os.environ.get(variable) or (
            tempfile.gettempdir() if variable == "TMPDIR" else None
        )
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory):
                lines.append(f"{variable}: {directory} can be written")
    # KFP sets this variable when it runs the source of a component. component.py is then not
    # imported, so the dependencies of kfp's compiler are not needed.
    os.environ["_KFP_RUNTIME"] = "true"
    importlib.import_module("kfp.dsl.executor_main")
    lines.append(f"kfp {metadata.version('kfp')}")
    for name in steps_in(image_set):
        importlib.import_module(STEPS[name].module)
        check_versions(name)
        lines.append(f"step {name}")
    lines.append(LIBRARY_CHECKS[image_set]())
    return lines


def main() -> None:
    """Run the check and print its lines."""
    parser = argparse.ArgumentParser(
        prog="python -m tuneline.selfcheck",
        description="Check that this environment can run an image's steps.",
    )
    parser.add_argument("set", choices=sorted(IMAGE_SETS))
    for line in check(parser.parse_args().set):
        print(line)


# Each check computes something small, because a library that can be imported may still lack its
# binaries.


def _light() -> str:
    import numpy

    mean = numpy.random.default_rng(0).choice([0.0, 1.0], 1000).mean()
    assert 0.4 < mean < 0.6, mean
    return f"numpy {numpy.__version__}: a mean of {mean}"


def _train() -> str:
    import bitsandbytes
    import deepspeed
    import gguf
    import peft
    import torch
    import triton
    import trl
    from bitsandbytes import functional

    # transformers reads .gguf files with this package.
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_1] == (32, 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    # The limit is half of the widest gap between NF4 values, from -1 to -0.696.
    assert error < 0.16, error
    importlib.import_module("tuneline.kernels.patching")
    return (
        f"torch {torch.__version__}, trl {trl.__version__}, peft {peft.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}: NF4 on {device}, error {error:.3f}, "
        f"triton {triton.__version__}, deepspeed {deepspeed.__version__}"
    )


def _gguf() -> str:
    # transformers needs accelerate to load the merged model onto a device.
    import accelerate
    import llama_cpp

    from tuneline.quantize.gguf.converter import find

    assert b"CPU" in llama_cpp.llama_print_system_info()
    return (
        f"llama-cpp-python {llama_cpp.__version__}, with {find().name}, "
        f"accelerate {accelerate.__version__}"
    )


def _gptq() -> str:
    import compressed_tensors
    import gptqmodel
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme

    assert gptqmodel.QuantizeConfig(bits=4, group_size=64).bits == 4
    fp8 = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).weights.pytorch_dtype()
    assert torch.ones(1).to(fp8).item() == 1
    return (
        f"gptqmodel {gptqmodel.__version__}, compressed-tensors "
        f"{compressed_tensors.__version__}, torch {torch.__version__}"
    )


def _evaluate() -> str:
    from lm_eval.api.metrics import mean

    assert mean([0.0, 1.0]) == 0.5
    importlib.import_module("tuneline.kernels.inference")
    return f"lm-eval {metadata.version('lm_eval')}"


def _publish() -> str:
    import fsspec
    import huggingface_hub
    import mlflow
    import model_registry
    import oras.version

    from tuneline.publish.target import STORE_SCHEMES
    from tuneline.publish.targets.registry_client import Client

    huggingface_hub.HfApi()
    for scheme in STORE_SCHEMES:
        fsspec.get_filesystem_class(scheme)
    Client("localhost")
    mlflow.MlflowClient("http://localhost")
    registries = f"oras {oras.version.__version__}, mlflow {mlflow.__version__}"
    registries += f", model-registry {model_registry.__version__}"
    stores = f"fsspec {fsspec.__version__}, {registries}"
    return f"huggingface_hub {huggingface_hub.__version__}, {stores}"


LIBRARY_CHECKS: dict[str, Callable[[], str]] = {
    "light": _light,
    "train": _train,
    "gguf": _gguf,
    "gptq": _gptq,
    "evaluate": _evaluate,
    "publish": _publish,
}
"""For each dependency set, a function that checks the set's libraries and returns a line with their
versions."""


if __name__ == "__main__":
    main()
