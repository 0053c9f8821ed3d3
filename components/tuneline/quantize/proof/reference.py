"""Measure the merged model with transformers, once per step, as the reference for exports."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneline.artifacts import HELDOUT_FILE, read_jsonl
from tuneline.models.heldout_rows import MAX_ROW_TOKENS, Row, read_rows
from tuneline.models.tokenizer.chat_templates import REFUSALS
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.proof import benchmark, probes
from tuneline.quantize.proof.benchmark import Benchmark
from tuneline.quantize.proof.generation import Generation
from tuneline.quantize.proof.transformers_model import TransformersModel

BUILT_IN_PROMPT = "The capital of France is"
"""Prompt to use if the dataset has no held-out rows, or if the GGUF conversion, which gets no
dataset, is checked."""

NUM_BUILT_IN_ROWS = 8
"""Number of texts of probes.py to use as rows if there is no dataset."""
MAX_PROMPTS = 200
"""Largest number of held-out prompts on which tokenizers are compared."""


@dataclass(frozen=True)
class Wording:
    """How a model's prompts and answers are written, without the model's weights."""

    model_dir: Path
    tokenizer: Any
    stop_ids: list[int]
    """Tokens after which the model stops."""
    prompts: list[str]
    """Held-out prompts, or a built-in one."""
    end: str
    """Text that the chat template puts after an answer; "" if unknown."""

    @property
    def stop_texts(self) -> list[str]:
        """Texts that end an answer; the text that ends a turn in the chat template comes first."""
        # Tokens are decoded, because a vocabulary may write a newline as another character.
        tokens = [self.tokenizer.decode([token]) for token in self.stop_ids]
        return [text for text in dict.fromkeys([self.end.strip(), *tokens]) if text]

    def tokenise(self, text: str) -> list[int]:
        """Return the token IDs of a text; special tokens are recognised, but none are added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokenise_prompt(self, text: str) -> list[int]:
        """Return the token IDs of a prompt as the model saw prompts in training.

        A chat template writes every special token itself. Without a template, the tokenizer adds
        those that begin a text.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template)[
            "input_ids"
        ]
        return ids

    def adds_bos(self) -> bool | None:
        """Return whether programs have to put the BOS token before a prompt.

        None if that does not matter, because the chat template writes the token.
        """
        text = BUILT_IN_PROMPT
        if self.tokenizer.chat_template:
            try:
                text = self.render([{"role": "user", "content": text}])
            except ValueError:
                return None
        begins = self.tokenise_prompt(text)[:1] == [self.tokenizer.bos_token_id]
        return None if begins and self.tokenizer.chat_template else begins

    def ends_of_turn(self) -> list[int]:
        """Return the stop tokens that end a text or a turn; all of them without a template."""
        if not self.tokenizer.chat_template:
            return self.stop_ids
        user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}
        try:
            text = self.render([user, answer], for_answer=False)
        except ValueError:
            return self.stop_ids
        after = self.tokenise(text.rpartition(answer["content"])[2])
        return [t for t in self.stop_ids if t in after or t == self.tokenizer.eos_token_id]

    def further_end(self) -> int | None:
        """Return the token that ends a turn in addition to the tokenizer's EOS, if there is one."""
        ends = [token for token in self.ends_of_turn() if token != self.tokenizer.eos_token_id]
        return ends[0] if ends else None

    def render(self, messages: list[dict[str, str]], *, for_answer: bool = True) -> str:
        """Return a conversation rendered by the chat template.

        Args:
            messages: the conversation.
            for_answer: whether to end with the generation prompt.

        Raises:
            ValueError: the template rejects the conversation.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer
            )
            return text
        except REFUSALS as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Reference(Wording):
    """Measurements of the merged model; the model itself does not stay in memory.

    `generation` continues the first of `prompts`.
    """

    num_tokens: int
    """Largest number of tokens to generate."""
    generation: Generation
    rows: list[Row]
    """Rows on which predictions are compared."""
    logits: list[torch.Tensor]
    """The merged model's logits for each row, [tokens, vocabulary]."""
    benchmark: Benchmark | None = None
    """Benchmark rows and the merged model's score; None if the recipe asks for no benchmark."""

    @property
    def prompt(self) -> str:
        """The prompt to generate from, in full; only its last MAX_ROW_TOKENS tokens are used."""
        return self.prompts[0]

    @property
    def num_context(self) -> int:
        """Context length that is needed for all rows, the generation and the benchmark."""
        generated = len(self.generation.prompt_ids) + self.num_tokens
        longest = self.benchmark.num_context if self.benchmark else 0
        return max(generated, longest, *(len(row.ids) for row in self.rows))


def prompts_of(dataset_dir: Path | None) -> tuple[list[str], str]:
    """Return held-out prompts, or a built-in one, and the text after an answer ("" if unknown)."""
    heldout = dataset_dir / HELDOUT_FILE if dataset_dir else None
    examples = read_jsonl(heldout)[:MAX_PROMPTS] if heldout and heldout.is_file() else []
    if not examples:
        return [BUILT_IN_PROMPT], ""
    return [row["prompt"] for row in examples], examples[0].get("end", "")


def for_export(
    config: QuantizeConfig, model_dir: Path, dataset_dir: Path, device: str = "cpu"
) -> Reference:
    """Measure the merged model as the recipe asks.

    Args:
        config: the `quantize` section of the recipe.
        model_dir: directory of the merged model.
        dataset_dir: directory that prepare made.
        device: "cpu" or "cuda".
    """
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
    """Load the merged model, generate from the first held-out prompt and compute the rows' logits.

    On a CPU the model computes in fp32, with its weights mapped from their files (`widening`). On a
    GPU it computes in the dtype of its weights, because fp32 may not fit.

    Args:
        model_dir: directory of the merged model.
        dataset_dir: directory that prepare made; None: use the built-in prompt and texts.
        num_rows: number of rows to compare.
        num_tokens: largest number of tokens to generate.
        num_benchmark_rows: number of held-out rows for the benchmark; 0: no benchmark.
        device: "cpu" or "cuda".

    Raises:
        ModelError: transformers cannot load the model.
        DataError: the dataset has no rows.
        ProofError: the model computes a logit that is not finite.
    """
    dtype: torch.dtype | str = torch.float32 if device == "cpu" else "auto"
    model = TransformersModel(model_dir, dtype=dtype, device=device)
    prompts, end = prompts_of(dataset_dir)
    if dataset_dir:
        rows = read_rows(dataset_dir, num_rows, model.tokenise)
    else:
        longest = sorted(probes.texts(), key=len)[-NUM_BUILT_IN_ROWS:]
        rows = [Row(model.tokenise(text), 1) for text in longest]
    # Of a long prompt only the end is used, as for rows. Exports get the same token IDs, not the
    # text.
    prompt_ids = (model.tokenise(prompts[0]) or [model.begin_id])[-MAX_ROW_TOKENS:]
    measured = Reference(
        model_dir=model_dir,
        tokenizer=model.tokenizer,
        stop_ids=model.stop_ids,
        prompts=prompts,
        end=end,
        num_tokens=num_tokens,
        generation=model.generate(prompt_ids, num_tokens=num_tokens),
        rows=rows,
        logits=[model.logits(row.ids) for row in rows],
        benchmark=benchmark.prepare(model, dataset_dir, num_benchmark_rows)
        if dataset_dir
        else None,
    )
    # Free the model now, because its mapped files count towards the pod's memory. Modules and their
    # patched forward methods refer to each other, so only the garbage collector frees them.
    del model
    gc.collect()
    return measured
