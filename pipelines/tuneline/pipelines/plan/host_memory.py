"""Estimate the pod memory of the steps that compute on a CPU.

Only memory that a process allocates has to fit into the pod's limit. The merged model and GGUF
files are memory-mapped: when memory is short, the kernel drops their pages and reads them again in
every pass, so a limit below their size costs time but does not fail the run. Memory in GiB,
measured for models of 8B and 1.1B (tests/measure/proof_memory.py): convert-gguf 3.4 and 1.9;
quantize-gguf to q4_k_m 4.8 (8B, comparing two rows) and 2.8 (1.1B, comparing eight rows);
measure-importance 0.3 for both models. quantize-gguf was measured before it reserved the context
that the file is served with. quantize-fp8 took 1.33 (0.35B parameters) and 1.35 (0.79B) with 32768
tokens in the vocabulary, and 3.58 (0.64B) with 131072, with two rows: its linear layers stay mapped
in FP8 and are widened one at a time.
"""

from dataclasses import dataclass

from tuneline.kinds import EXPORT_KINDS
from tuneline.models.context import MAX_CONTEXT
from tuneline.models.heldout_rows import MAX_ROW_TOKENS
from tuneline.pipelines.plan.estimate import llama_shape
from tuneline.pipelines.plan.model_facts import ModelFacts
from tuneline.quantize.formats import FORMATS
from tuneline.recipe import Recipe
from tuneline.steps import STEPS
from tuneline.train.memory.estimate import GIB

PROCESS_BYTES = 0.5 * GIB
"""Memory of Python, torch and transformers before any weight is loaded."""
CONVERTED_BYTES = 6
"""Bytes per weight of the largest tensor, of which llama.cpp's converter holds a float32 copy and
an f16 copy."""
COPIED_FRACTION = 0.8
"""Fraction of the weights that llama.cpp copies if it repacks the export's format. The remaining
weights are in tensors of other types."""
ROWS_COMPARED = 5
"""Rows of logits held in addition to the merged model's: one row of the export's logits, the
logarithms of both models' logits for that row, and intermediate results."""
FLOAT32_BYTES = 4
"""Bytes per weight of a step that loads the model in float32."""
WIDENED_COPIES = 2
"""Copies in float32 of the linear layer that an FP8 checkpoint computes with."""


@dataclass(frozen=True)
class HostMemory:
    """Estimated host memory of one step."""

    step: str
    own_bytes: float
    """Memory that the process allocates."""
    mapped_bytes: float
    """Size of the largest file that the step maps and reads repeatedly."""


def host_memory(
    recipe: Recipe, num_parameters: float, facts: ModelFacts | None = None
) -> list[HostMemory]:
    """Estimate the memory of each step on a CPU whose memory grows with the model.

    Args:
        recipe: the recipe.
        num_parameters: parameters of the base model.
        facts: sizes of the base model; None: those of a Llama with as many parameters.
    """
    quantize, lora = recipe.quantize, recipe.train.lora
    shape = facts.shape(lora) if facts else llama_shape(num_parameters, lora)
    model = 2 * num_parameters
    rows = quantize.num_proof_prompts + ROWS_COMPARED
    logits = rows * MAX_ROW_TOKENS * shape.vocab * FLOAT32_BYTES
    steps = []
    if quantize.gguf:
        # llama.cpp reserves an f16 key and value for each position of the context.
        context = 2 * 2 * shape.num_layers * shape.key_value * MAX_CONTEXT
        # The converter has ended before its file is proven.
        converted = PROCESS_BYTES + max(CONVERTED_BYTES * shape.vocab * shape.hidden, context)
        formats = [FORMATS[name] for name in quantize.gguf]
        copied = [format.bits_per_weight for format in formats if format.repacked]
        most_bits = COPIED_FRACTION * max(copied, default=0.0)
        proof = PROCESS_BYTES + context + logits + num_parameters * most_bits / 8
        steps += [
            HostMemory("convert-gguf", converted, model),
            HostMemory("quantize-gguf", max(converted, proof), model),
        ]
    if not recipe.placement.num_accelerators:
        wide = PROCESS_BYTES + FLOAT32_BYTES * num_parameters
        makers = [f"quantize-{kind}" for kind in EXPORT_KINDS if getattr(quantize, kind)]
        # In steps that would use a GPU if there was one, transformers loads the whole model, but
        # what FP8 stores of it stays mapped.
        loading = [name for name in (*makers, "evaluate") if STEPS[name].gpu]
        steps += [HostMemory(name, wide, 0.0) for name in loading if name != "quantize-fp8"]
        if quantize.fp8:
            widened = shape.num_other + WIDENED_COPIES * shape.mlp * shape.hidden
            proof = PROCESS_BYTES + FLOAT32_BYTES * widened + logits
            steps.append(HostMemory("quantize-fp8", proof, model))
    return steps
