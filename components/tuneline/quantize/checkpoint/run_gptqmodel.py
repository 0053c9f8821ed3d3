"""Run gptqmodel once: `python -m tuneline.quantize.checkpoint.run_gptqmodel JOB.json`.

This module runs in a child process, because gptqmodel reads its settings from the environment when
it is imported, patches transformers, writes `logs/` to the working directory and draws progress
bars on the terminal.
"""

import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(job_file: str) -> None:
    """Quantise and save a model with the settings in the job file that calibrated.py wrote.

    Writes the seconds that each stage took to a file that the job names.
    """
    with _uncollected():
        import torch
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    is_awq = job["method"] == "awq"
    config = QuantizeConfig(
        method=job["method"],
        format="gemm" if is_awq else "gptq",
        bits=job["bits"],
        group_size=job["group_size"],
        desc_act=job["desc_act"],
        # AWQ stores zero points. GPTQ without them is what most kernels support.
        sym=not is_awq,
        offload_to_disk=False,
        # The default first compiles a C++ extension, which takes 93 s and requires a compiler.
        pack_impl="original",
    )
    times = {"start": time.monotonic() - job["started_at"]}

    def stage(name: str) -> None:
        times[name] = time.monotonic() - job["started_at"] - sum(times.values())

    on_gpu = torch.cuda.is_available()
    if on_gpu and not is_awq:
        _round_blocks_by_triton()
    dtype = "auto"
    if is_awq:
        # gptqmodel packs AWQ in the dtype that it quantised in, which may not be float32.
        dtype = job["dtype"]
    elif not on_gpu:
        # Most CPUs emulate bfloat16. Then float32 takes a third of the time of bfloat16.
        dtype = "float32"
    model = GPTQModel.load(
        job["model_dir"],
        config,
        dtype=dtype,
        device="cuda" if on_gpu else "cpu",
    )
    stage("load")
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]],
        batch_size=8,
        calibration_data_min_length=1,
        # The kernel of AWQ in torch alone. The default needs a GPU, and compiles one.
        backend=BACKEND.AWQ_TORCH if is_awq else BACKEND.AUTO,
    )
    stage("quantise")
    if not on_gpu and not is_awq:
        _restore_dtype(model.model, job["model_dir"])
    model.save(job["target"])
    stage("save")
    Path(job["times_file"]).write_text(json.dumps(times), encoding="utf-8")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Leave what the body imports to the end of the process, instead of looking for garbage in it.

    gptqmodel imports some 6,000 modules. Looking through their objects again and again takes more
    than a second while they are imported, and another one when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _round_blocks_by_triton() -> None:
    """Let gptqmodel round columns with our kernel, which needs no compiler.

    gptqmodel compiles its own with nvcc when it is first used, for about a minute. Where nvcc is
    missing, it rounds one column after another with some 15 small kernels.
    """
    from gptqmodel.quantization import gptq_cuda

    from tuneline.kernels.ops.gptq_round import round_block

    gptq_cuda.block_update_available = lambda: True
    gptq_cuda.gptq_block_update = round_block


def _restore_dtype(model: Any, model_dir: str) -> None:
    """Cast embeddings, norms and head back to the dtype of the merged model's files."""
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model_dir).dtype or torch.float32
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


if __name__ == "__main__":
    main(sys.argv[1])
