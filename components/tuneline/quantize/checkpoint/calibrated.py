"""Make a checkpoint with gptqmodel, whose rounding is calibrated on training rows, and prove it."""

import importlib.util
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ToolError
from tuneline.models.weight_files import SINGLE_FILE
from tuneline.quantize import formats
from tuneline.quantize.calibration import read_rows
from tuneline.quantize.checkpoint.companions import take_companions
from tuneline.quantize.checkpoint.proof import prove
from tuneline.quantize.child_process import run_to_end
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.machine import few_threads, raise_if_full
from tuneline.quantize.proof.reference import for_export
from tuneline.quantize.proof.transformers_model import choose_device
from tuneline.runtime.scratch import scratch_directory

logger = logging.getLogger(__name__)

MAX_ROW_TOKENS = 2048
"""Number of tokens of a calibration row that are used. It limits memory: the device holds the
inputs and the outputs of a layer for all rows. At the width of an 8B model, 128 rows of this length
take 2 x 2.1 GB in bf16, in addition to the layer and its Hessians."""


def export_calibrated(
    config: QuantizeConfig,
    *,
    format: str,
    merged_dir: Path,
    dataset_dir: Path,
    target: Path,
    group_size: int,
    desc_act: bool,
    dtype: Literal["float16", "bfloat16"],
) -> QuantizedModel:
    """Make and check a checkpoint, on a GPU if the model fits and on the CPU otherwise.

    Args:
        config: the `quantize` section of the recipe.
        format: name of a format of GPTQ or AWQ.
        merged_dir: directory of the merged model.
        dataset_dir: directory that prepare made; the rounding is calibrated on its training rows.
        target: directory to write the checkpoint to.
        group_size: number of weights per scale.
        desc_act: GPTQ: whether columns are quantised in order of decreasing activation.
        dtype: dtype in which the checkpoint computes when it is proven. AWQ also stores its scales
            in it.

    Returns:
        The record of the checkpoint.

    Raises:
        DataError: there are no training rows.
        ToolError: gptqmodel is missing or failed.
        ProofError: the checkpoint does not load or does not answer, or its predictions are further
            from the merged model's than the bound allows.
    """
    kind, bits = formats.FORMATS[format].kind, formats.FORMATS[format].bits
    device = choose_device(merged_dir)
    rows = read_rows(
        dataset_dir,
        config.num_calibration_rows,
        setting="num_calibration_rows",
        purpose=f"{kind.upper()} calibrates",
    )
    with few_threads():
        merged = for_export(config, merged_dir, dataset_dir, device)
        _run_gptqmodel(
            target,
            {
                "method": kind,
                "model_dir": str(merged_dir.resolve()),
                "target": str(target.resolve()),
                "bits": bits,
                "group_size": group_size,
                "desc_act": desc_act,
                "dtype": dtype,
                "rows": [row[:MAX_ROW_TOKENS] for row in rows],
            },
        )
        take_companions(merged_dir, target)
        return prove(
            config,
            merged_dir,
            target,
            format=format,
            reference=merged,
            dtype=getattr(torch, dtype),
            device=device,
        )


def _run_gptqmodel(target: Path, job: dict[str, Any]) -> None:
    """Run gptqmodel in a child process (run_gptqmodel.py), with a job that it describes."""
    kind = job["method"]
    if importlib.util.find_spec("gptqmodel") is None:
        raise ToolError(
            f"gptqmodel is not installed, but {kind.upper()} exports need it: run `make install`, "
            f"use the gptq image, or set quantize.{kind} to [] in the recipe"
        )
    job = {**job, "started_at": time.monotonic(), "times_file": "times.json"}
    settings = {
        # At least two: on two cores the default is one worker, but gptqmodel then asks for two.
        "GPTQMODEL_CPU_WORKERS": str(max(2, len(os.sched_getaffinity(0)))),
        # By default, waiting OpenMP threads stay in a busy loop. If another process is busy, this
        # takes longer than the work.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with scratch_directory() as scratch:
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = run_to_end(
            [sys.executable, "-m", "tuneline.quantize.checkpoint.run_gptqmodel", "job.json"],
            cwd=scratch,
            env=settings | os.environ,
        )
        times_file = scratch / job["times_file"]
        if times_file.is_file():
            times = json.loads(times_file.read_text(encoding="utf-8"))
            stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
            logger.info("gptqmodel: %s", stages)
    if done.returncode != 0:
        raise_if_full(target / SINGLE_FILE)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ToolError(
            f"gptqmodel could not quantise the model: {lines[-1] if lines else done.returncode}"
        )
