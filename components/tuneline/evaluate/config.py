"""The recipe's part for the benchmarks."""

from pydantic import Field

from tuneline.strict_model import StrictModel


class EvaluateConfig(StrictModel):
    """Which benchmarks run on the base and on the tuned model."""

    tasks: tuple[str, ...] = ("heldout_choice",)
    """Names from lm-eval's registry, from `task_dir`, or ours over the data set's held-out rows:
    heldout_choice (pick the right answer), heldout_exact (greedy answer equals the reference),
    heldout_perplexity (of the answers)."""
    task_dir: str | None = None
    """A directory with lm-eval task YAML files over local JSONL."""
    limit: int | None = Field(None, ge=1)
    """Samples a task; default: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Default: what the task says."""
    batch_size: int = Field(8, ge=1)
    num_generations: int = Field(6, ge=0)
    """Held-out prompts that the model answers for the report, greedily."""
    max_new_tokens: int = Field(48, ge=1)
    """Length of those answers."""
