"""Run gptqmodel once: `python -m tuneline.quantize.gptq_worker JOB.json`.

A process of its own, because gptqmodel reads its settings from the environment when imported,
patches transformers, writes `logs/` into the working directory and draws on the terminal.
"""

import json
import sys
from pathlib import Path


def main(job_file: str) -> None:
    """Quantise as a job of `tuneline.quantize.gptq` says, and save."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    config = QuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        desc_act=job["desc_act"],
        offload_to_disk=False,
        # Its default compiles a C++ extension first: 93 s, and a compiler in the image.
        pack_impl="original",
    )
    on_gpu = torch.cuda.is_available()
    # Most CPUs emulate bfloat16: a third of the time in float32.
    model = GPTQModel.load(
        job["model_dir"],
        config,
        dtype="auto" if on_gpu else torch.float32,
        device="cuda" if on_gpu else "cpu",
    )
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]],
        batch_size=8,
        calibration_data_min_length=1,
    )
    model.save(job["target"])


if __name__ == "__main__":
    main(sys.argv[1])
