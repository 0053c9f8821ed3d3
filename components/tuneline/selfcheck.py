"""Check that an environment can run the steps of one image: `python -m tuneline.selfcheck SET`.

Every image runs it as the last step of its build, so one that lacks a package does not come to be.
It also tells, in a pod, whether that pod's user can write where the steps write.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

STEPS = {
    "light": ("plan", "gate", "report", "diagnose", "train"),
    "train": ("fetch", "prepare", "train", "merge"),
    "gguf": ("quantize",),
    "gptq": ("quantize",),
    "evaluate": ("evaluate",),
    "publish": ("publish",),
}
"""The steps that each image runs."""

_MODULES = {
    ("light", "plan"): "tuneline.pipelines.plan.run",
    ("light", "train"): "tuneline.train.trainjob.follow",
}
# Where it is not the step's `run`.

CACHE_VARIABLES = ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR")


def check(name: str) -> list[str]:
    """Check the environment for the set `name` and return a line for each thing that was tried.

    Raises:
        Exception: whatever the first thing that does not work raises.
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
    # As KFP starts a component: it sends the component's source along, so component.py is not
    # imported, and kfp's own dependencies are not needed.
    os.environ["_KFP_RUNTIME"] = "true"
    importlib.import_module("kfp.dsl.executor_main")
    lines.append(f"kfp {metadata.version('kfp')}")
    for step in STEPS[name]:
        importlib.import_module(_MODULES.get((name, step), f"tuneline.{step}.run"))
        lines.append(f"step {step}")
    lines.append(_WORK[name]())
    return lines


def main() -> None:
    """Run the check and say what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tuneline.selfcheck",
        description="Check that this environment can run an image's steps.",
    )
    parser.add_argument("set", choices=sorted(STEPS))
    for line in check(parser.parse_args().set):
        print(line)


# Something small of the work itself: a library that imports may still lack its binary part.


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

    # Transformers reads .gguf files with it.
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_1] == (32, 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    # Half of NF4's widest gap, between -1 and -0.696.
    assert error < 0.16, error
    importlib.import_module("tuneline.kernels.patching")
    return (
        f"torch {torch.__version__}, trl {trl.__version__}, peft {peft.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}: NF4 on {device}, error {error:.3f}, "
        f"triton {triton.__version__}, deepspeed {deepspeed.__version__}"
    )


def _gguf() -> str:
    # Transformers loads the merged model onto a device with it.
    import accelerate
    import llama_cpp

    from tuneline.quantize.gguf.converter import find

    assert b"CPU" in llama_cpp.llama_print_system_info()
    return (
        f"llama-cpp-python {llama_cpp.__version__}, with {find().name}, "
        f"accelerate {accelerate.__version__}"
    )


def _gptq() -> str:
    import gptqmodel
    import torch

    assert gptqmodel.QuantizeConfig(bits=4, group_size=64).bits == 4
    return f"gptqmodel {gptqmodel.__version__}, torch {torch.__version__}"


def _evaluate() -> str:
    from lm_eval.api.metrics import mean

    assert mean([0.0, 1.0]) == 0.5
    return f"lm-eval {metadata.version('lm_eval')}"


def _publish() -> str:
    import huggingface_hub

    huggingface_hub.HfApi()
    return f"huggingface_hub {huggingface_hub.__version__}"


_WORK: dict[str, Callable[[], str]] = {
    "light": _light,
    "train": _train,
    "gguf": _gguf,
    "gptq": _gptq,
    "evaluate": _evaluate,
    "publish": _publish,
}


if __name__ == "__main__":
    main()
