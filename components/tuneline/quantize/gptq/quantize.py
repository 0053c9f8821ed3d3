"""Make GPTQ checkpoints with gptqmodel, and load them again through transformers."""

import importlib.util
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ModelError, ProofError, ToolError
from tuneline.models import tokenizer_files
from tuneline.models.weight_files import SINGLE_FILE
from tuneline.quantize.child_process import run_to_end
from tuneline.quantize.disk import raise_if_full
from tuneline.quantize.formats import Bound
from tuneline.quantize.proof.reference import Reference
from tuneline.quantize.threads import num_threads

if TYPE_CHECKING:
    from tuneline.quantize.proof.transformers_model import TransformersModel

GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
"""What the kernels know, the largest first."""
MAX_ROW_TOKENS = 2048
"""Of a calibration row. The inputs and outputs of a layer are kept on the device for all rows: at
8B's width 128 rows of so many tokens are 2 x 2.1 GB in bf16, beside a layer and its Hessians."""
NUM_SPEED_TOKENS = 16
# As vLLM's auto_gptq.py and marlin_utils.py have it, 2026-11; all ours are symmetric.
VLLM_BITS, VLLM_GROUP_SIZES = (4, 8), (32, 64, 128)


def quantize(
    model_dir: Path,
    target: Path,
    *,
    format: str,
    rows: list[list[int]],
    group_size: int,
    desc_act: bool,
    reference: Reference,
    bound: Bound,
    device: str = "cpu",
) -> QuantizedModel:
    """Quantise on the calibration `rows` of token ids, reload on `device`, generate and compare.

    Raises:
        ModelError: no group size fits the model's layers.
        ToolError: gptqmodel is missing or failed.
        ProofError: the checkpoint does not load, does not answer, or is over its bound.
    """
    import torch

    from tuneline.quantize.proof import quality
    from tuneline.quantize.proof.transformers_model import TransformersModel

    bits = int(format.removeprefix("gptq-").removesuffix("bit"))
    taken, note = choose_group_size(linear_widths(model_dir), group_size)
    notes = [note] if note else []
    for_vllm = bits in VLLM_BITS and taken in VLLM_GROUP_SIZES
    if not for_vllm:
        notes.append(f"vLLM has no kernel for {bits} bits in groups of {taken}")
    _run(model_dir, target, bits, taken, desc_act, [row[:MAX_ROW_TOKENS] for row in rows])
    _take_companions(model_dir, target)
    weights = sorted(target.glob("*.safetensors"))
    try:
        model = TransformersModel(target, dtype=torch.float16, device=device)
    except ModelError as error:
        raise ProofError(f"the export {format} does not load again: {error}") from error
    generated = model.generate(reference.generation.prompt_ids, num_tokens=reference.num_tokens)
    if not generated.text.strip() and reference.generation.text.strip():
        raise ProofError(
            f"the export {format} generates nothing where the merged model says "
            f"{reference.generation.text[:60]!r}: take gptq-8bit, or more calibration rows"
        )
    found = quality.compare(
        reference.rows, reference.logits, (model.logits(row.ids) for row in reference.rows)
    )
    quality.hold(found, bound, format)
    tensors = [tensor for path in weights for tensor in _tensors(path)]
    num_bytes = sum(path.stat().st_size for path in weights)
    num_weights = sum(
        math.prod(shape) for path in _weight_files(model_dir) for _, _, shape in _tensors(path)
    )
    return QuantizedModel(
        format=format,
        kind="gptq",
        file=".",
        num_bytes=num_bytes,
        bits_per_weight=round(8 * num_bytes / num_weights, 4),
        group_size=taken,
        vllm_has_kernel=for_vllm,
        tensor_types=dict(Counter(dtype.lower() for _, dtype, _ in tensors).most_common()),
        notes=notes,
        max_mean_kl=bound.max_mean_kl,
        min_top1_agreement=bound.min_top1_agreement,
        stop_tokens=reference.stop_texts,
        prompt=reference.prompt,
        generated=generated.text,
        reference=reference.generation.text,
        **_speed(model, reference, device),
        **found.record(),
        **(reference.benchmark.record(model) if reference.benchmark else {}),
    )


def _speed(model: "TransformersModel", reference: Reference, device: str) -> dict[str, float | int]:
    """Return tokens/s and threads for a table whose other formats are timed on a CPU."""
    if device != "cpu":
        return {}
    speed = model.tokens_per_second(reference.generation.prompt_ids, num_tokens=NUM_SPEED_TOKENS)
    return {"tokens_per_second": round(speed, 2), "num_threads": num_threads()}


def choose_group_size(widths: set[int], wanted: int) -> tuple[int, str | None]:
    """Return the largest group size up to `wanted` that divides every layer, and a note.

    gptqmodel quantises and saves with one that does not divide, and fails at the first forward.

    Raises:
        ModelError: none does.
    """
    sizes = [wanted, *(size for size in GROUP_SIZES if size < wanted)]
    for size in sizes:
        if all(width % size == 0 for width in widths):
            if size == wanted:
                return size, None
            odd = ", ".join(str(width) for width in sorted(widths) if width % wanted)
            return size, f"group size {size}, not {wanted}: layers are {odd} wide"
    raise ModelError(
        f"no group size up to {wanted} divides layers of the widths {sorted(widths)}: "
        "GPTQ cannot hold this model; set quantize.gptq to []"
    )


def linear_widths(model_dir: Path) -> set[int]:
    """Return the input widths of the linear layers inside the decoder's blocks."""
    widths = {
        shape[1]
        for path in _weight_files(model_dir)
        for name, _, shape in _tensors(path)
        if len(shape) == 2 and name.endswith(".weight") and ".layers." in name
    }
    if not widths:
        raise ModelError(f"{model_dir} has no linear layers that GPTQ could quantise")
    return widths


def _run(
    model_dir: Path, target: Path, bits: int, group_size: int, desc_act: bool, rows: list[list[int]]
) -> None:
    if importlib.util.find_spec("gptqmodel") is None:
        raise ToolError(
            "gptqmodel is not installed, and GPTQ exports need it: `make install`, the gptq image, "
            "or set quantize.gptq to [] in the recipe"
        )
    job = {
        "model_dir": str(model_dir.resolve()),
        "target": str(target.resolve()),
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "rows": rows,
    }
    settings = {
        # By default one worker on two cores, where it then asks for two.
        "GPTQMODEL_CPU_WORKERS": str(max(2, len(os.sched_getaffinity(0)))),
        # Beside another busy process, waiting OpenMP threads spin longer than they work.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = run_to_end(
            [sys.executable, "-m", "tuneline.quantize.gptq.process", "job.json"],
            cwd=Path(scratch),
            env=settings | os.environ,
        )
    if done.returncode != 0:
        raise_if_full(target / SINGLE_FILE)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ToolError(
            f"gptqmodel could not quantise the model: {lines[-1] if lines else done.returncode}"
        )


def _take_companions(model_dir: Path, target: Path) -> None:
    """Put the merged model's own tokenizer and settings beside the weights.

    As transformers 5 saves them, transformers 4 and servers built on it load no tokenizer, or
    compute with other angles; and this machine's temporary path stands in them.
    """
    quantization = json.loads((target / "config.json").read_text(encoding="utf-8"))
    quantization = quantization["quantization_config"]
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    _drop(quantization, "offload_to_disk_path")
    for name, content in (
        ("config.json", {**settings, "quantization_config": quantization}),
        ("quantize_config.json", quantization),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")
    tokenizer_files.copy_tokenizer(model_dir, target)
    generation = model_dir / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)


def _drop(node: object, key: str) -> None:
    if isinstance(node, dict):
        node.pop(key, None)
        for value in node.values():
            _drop(value, key)


def _weight_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))


def _tensors(path: Path) -> list[tuple[str, str, list[int]]]:
    """List name, type and shape of a safetensors file's tensors; only its header is read."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return [(name, entry["dtype"], entry["shape"]) for name, entry in header.items()]
