"""The `evaluate` section of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from tuneline.strict_model import StrictModel


class EvaluateConfig(StrictModel):
    """Which benchmarks run on the base and on the tuned model."""

    tasks: tuple[str, ...] = ("heldout_choice",)
    """Benchmarks to run: names from lm-eval's registry, from `task_dir`, or one of three over the
    dataset's held-out rows: heldout_choice (pick the right answer), heldout_exact (the greedy
    answer equals the reference) and heldout_perplexity (log perplexity of the answers)."""
    task_dir: str | None = None
    """A directory with lm-eval task YAML files over local data files. null: no additional
    tasks."""
    limit: int | None = Field(default=None, ge=1)
    """Largest number of samples per task. null: all samples."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in each prompt before the question. null: the number that the task declares. The
    tasks over held-out rows ignore it."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Prompts per batch, for likelihoods and for generation. auto: as many as fit into the free
    memory of the GPU, and on a CPU as many as have 4096 tokens. If memory runs out, batches are
    divided, so the largest possible number is never needed here."""
    kernels: Literal["auto", "off"] = "auto"
    """Fused layers for the log likelihoods of long answers. auto: use them if the GPU can (Ampere
    or newer). off: never use them."""
    prompt_rows: int = Field(default=64, ge=0)
    """Held-out rows for the control task prompt_dependence, which runs with the tasks over held-out
    rows: how much likelier an answer is after its own prompt than after the prompt of another row.
    The gate holds a tuned model that depends less on its prompts than the base model. 0 switches
    the control off."""
    num_examples: int = Field(default=8, ge=0)
    """Training rows that the base model sees in its prompt in a second measurement on the tasks
    over held-out rows: what prompting alone gives. The gate compares the tuned model, without
    examples, with it; report and model card show the comparison, which decides nothing. The
    examples have at most 1024 tokens together. 0 switches the measurement off."""
    num_generations: int = Field(default=6, ge=0)
    """Held-out prompts that each model (base and tuned) answers greedily for the report; 0 for
    none."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Largest number of tokens of each of these answers."""
