"""Estimate what the steps that compute on a CPU take of a pod's memory.

Only what a process holds of its own counts against a limit for good. The merged model and GGUF
files are mapped: the kernel drops their pages where room is short, and reads them again at every
pass, so that a limit below them costs time and no run. Measured at 8B and 1.1B, in GiB
(tests/measure/proof_memory.py): convert-gguf 3.4 and 1.9, quantize-gguf to q4_k_m 4.8 with two
rows to compare, and 2.8 with eight; measure-importance 0.3, whatever the size.
"""

from dataclasses import dataclass

from tuneline.models.heldout_rows import MAX_ROW_TOKENS
from tuneline.pipelines.plan.estimate import BITS, DEFAULT_BITS, llama_shape
from tuneline.recipe import Recipe
from tuneline.train.memory.estimate import GIB

PROCESS_BYTES = 0.5 * GIB
"""Python, torch and transformers."""
CONVERTED_BYTES = 6
"""Of each number of the largest tensor, which llama.cpp's converter holds in float32 and f16."""
COPIED_SHARE = 0.8
"""Of such a format's weights; a part of its tensors is of another type."""
COPIED = ("q4", "iq4_nl", "q2_k")
"""Formats that llama.cpp copies into another order for a CPU's wide registers; of the others, on an
EPYC with AVX-512, it computes with what is mapped. On ARM, and with AMX, q8_0 is copied as well."""
ROWS_COMPARED = 5
"""Beside the logits of all rows: an export's of one, both as logarithms, and what comes between."""
WIDE_BYTES = 4
"""Of each weight, where a step loads a model in float32."""


@dataclass(frozen=True)
class HostMemory:
    """Of one step, in bytes."""

    step: str
    own_bytes: float
    mapped_bytes: float
    """Of the largest file that it reads over and over."""


def host_memory(recipe: Recipe, num_parameters: float) -> list[HostMemory]:
    """Estimate the steps whose memory grows with the model, and that are not measured on a GPU."""
    quantize = recipe.quantize
    shape = llama_shape(num_parameters, recipe.train.lora)
    model = 2 * num_parameters
    found = []
    if quantize.gguf:
        converted = PROCESS_BYTES + CONVERTED_BYTES * shape.vocab * shape.hidden
        rows = quantize.num_proof_prompts + ROWS_COMPARED
        logits = rows * MAX_ROW_TOKENS * shape.vocab * WIDE_BYTES
        copied = [BITS.get(name, DEFAULT_BITS) for name in quantize.gguf if name.startswith(COPIED)]
        most_bits = COPIED_SHARE * max(copied, default=0.0)
        proof = PROCESS_BYTES + logits + num_parameters * most_bits / 8
        found += [
            HostMemory("convert-gguf", converted, model),
            HostMemory("quantize-gguf", max(converted, proof), model),
        ]
    if not recipe.placement.num_accelerators:
        wide = PROCESS_BYTES + WIDE_BYTES * num_parameters
        found += [HostMemory("quantize-gptq", wide, 0.0)] if quantize.gptq else []
        found += [HostMemory("evaluate", wide, 0.0)]
    return found
