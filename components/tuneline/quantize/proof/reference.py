"""What an export is held against: the merged model in transformers, measured once for a step."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneline.artifacts import HELDOUT_FILE, read_jsonl
from tuneline.models.heldout_rows import MAX_ROW_TOKENS, Row, read_rows
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.proof import benchmark, probes
from tuneline.quantize.proof.benchmark import Benchmark
from tuneline.quantize.proof.generation import Generation

if TYPE_CHECKING:
    import torch

BUILT_IN_PROMPT = "The capital of France is"
"""Where a data set keeps no held-out rows, and for the conversion, which sees no data set."""

NUM_BUILT_IN_ROWS = 8
MAX_PROMPTS = 200
"""Held-out prompts that are tokenised for comparison."""


@dataclass(frozen=True)
class Reference:
    """The merged model's answers; the model itself is not kept in memory."""

    model_dir: Path
    tokenizer: Any
    stop_ids: list[int]
    """Tokens after which the merged model stops."""
    prompts: list[str]
    """Held-out prompts, the generation's first."""
    end: str
    """What the chat template puts after an answer; "" where it is not known."""
    num_tokens: int
    """How many the generation may have."""
    generation: Generation
    rows: list[Row]
    logits: list["torch.Tensor"]
    """A row's, [tokens, vocabulary]."""
    benchmark: Benchmark | None = None
    """Where the recipe asks for one."""

    @property
    def prompt(self) -> str:
        """The prompt of the generation, whole; what goes on from it are its last tokens."""
        return self.prompts[0]

    @property
    def num_context(self) -> int:
        """Tokens that the longest row or generation takes."""
        generated = len(self.generation.prompt_ids) + self.num_tokens
        longest = self.benchmark.num_context if self.benchmark else 0
        return max(generated, longest, *(len(row.ids) for row in self.rows))

    @property
    def stop_texts(self) -> list[str]:
        """What ends an answer, as text: the end of a turn first."""
        # Decoded, for a vocabulary spells a newline in its own way.
        tokens = [self.tokenizer.decode([token]) for token in self.stop_ids]
        return [text for text in dict.fromkeys([self.end.strip(), *tokens]) if text]

    def tokenise(self, text: str) -> list[int]:
        """Return the token ids of a text, its special tokens recognised and none added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(self, messages: list[dict[str, str]], *, for_answer: bool = True) -> str:
        """Return what the chat template makes of a conversation.

        Raises:
            ValueError: the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error


def for_export(
    config: QuantizeConfig, model_dir: Path, dataset_dir: Path, device: str = "cpu"
) -> Reference:
    """Measure what a recipe asks an export to be held against."""
    return measure(
        model_dir,
        dataset_dir=dataset_dir,
        num_rows=config.num_proof_prompts,
        num_tokens=config.num_check_tokens,
        num_benchmark_rows=config.num_benchmark_rows,
        device=device,
    )


def measure(
    model_dir: Path,
    *,
    dataset_dir: Path | None,
    num_rows: int,
    num_tokens: int,
    num_benchmark_rows: int = 0,
    device: str = "cpu",
) -> Reference:
    """Load the merged model, generate from the first held-out prompt, keep rows' logits.

    Without a data set, the built-in prompt and texts are taken. On a CPU it computes in fp32, with
    the weights in their files (`widening`); on a GPU in the weights' own type, for want of room.

    Raises:
        ModelError: transformers does not load it.
        DataError: the data set has no rows.
        ProofError: it computes a logit that is not finite.
    """
    import torch

    from tuneline.quantize.proof.transformers_model import TransformersModel

    dtype = torch.float32 if device == "cpu" else "auto"
    model = TransformersModel(model_dir, dtype=dtype, device=device)
    heldout = dataset_dir / HELDOUT_FILE if dataset_dir else None
    found = read_jsonl(heldout)[:MAX_PROMPTS] if heldout and heldout.is_file() else []
    prompts = [row["prompt"] for row in found] or [BUILT_IN_PROMPT]
    if dataset_dir:
        rows = read_rows(dataset_dir, num_rows, model.tokenise)
    else:
        longest = sorted(probes.texts(), key=len)[-NUM_BUILT_IN_ROWS:]
        rows = [Row(model.tokenise(text), 1) for text in longest]
    # Its end, as of a row: exports are given these tokens.
    prompt_ids = (model.tokenise(prompts[0]) or [model.begin_id])[-MAX_ROW_TOKENS:]
    measured = Reference(
        model_dir=model_dir,
        tokenizer=model.tokenizer,
        stop_ids=model.stop_ids,
        prompts=prompts,
        end=found[0].get("end", "") if found else "",
        num_tokens=num_tokens,
        generation=model.generate(prompt_ids, num_tokens=num_tokens),
        rows=rows,
        logits=[model.logits(row.ids) for row in rows],
        benchmark=benchmark.prepare(model, dataset_dir, num_benchmark_rows)
        if dataset_dir
        else None,
    )
    # Its modules and their forwards hold each other, and pages of files count for a pod's memory.
    del model
    gc.collect()
    return measured
