"""The records of the merged model and of what is made from it."""

import math
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.kinds import ExportKind
from tuneline.record import Record
from tuneline.strict_model import StrictModel

MAX_SHARE_OF_TUNING = 0.5
"""Distance of an export from the merged model above which it is said, as a fraction of the distance
of the base model."""


LOSS_ROUNDING = 0.005
"""Difference of two means of losses, in nats per token, that the order of operations in 16 bits
explains: three times the largest that numbers of ranks made (docs/numbers.md)."""


class MergeProof(Record):
    """How the merged model was made, and how far it differs from base model plus adapter."""

    filename: ClassVar[str] = "merge.json"
    role: ClassVar[str] = "merged"
    required_ancestors: ClassVar[tuple[str, ...]] = ("base_model", "dataset", "adapter")

    base: Literal["dequantized", "original"]
    """Base weights that the adapter was added to: "dequantized" are the 4-bit weights that training
    used, converted back; "original" are the weights of the base model."""
    base_asked: Literal["dequantized", "original", "auto"] | None = None
    """Setting of the recipe; auto chooses the base weights with the lower loss."""
    base_losses: dict[str, float] = Field(default_factory=dict)
    """Loss of base model plus adapter on the answers of the compared rows, in nats per token, for
    each of the base weights that were tried."""
    merged_loss: float | None = None
    """Loss of the merged model on the same rows."""
    eval_loss: float | None = None
    """Loss of the merged model on training's evaluation rows, in nats per token; null if it was not
    computed."""
    trained_eval_loss: float | None = None
    """Loss that training measured on the same rows, with the adapter beside the base weights."""
    num_eval_tokens: int = 0
    """Number of tokens over which the two losses are means."""
    tuning_kl: float | None = None
    """Mean KL divergence per token of the base model from base plus adapter, in nats: how far the
    tuning moved the model. Null in the record of an older version."""
    dtype: str
    num_bytes: int
    num_shards: int
    num_merged_modules: int
    num_prompts: int
    max_logit_difference: float
    """Largest absolute difference of a logit between base model plus adapter and merged model."""
    mean_kl: float
    """Mean KL divergence per token of the merged model from base model plus adapter, in nats."""
    top1_agreement: float
    """Fraction of positions at which both have the same most likely token, 0 to 1. Tokens whose
    logits differ by at most 0.1 in base model plus adapter count as equally likely."""
    max_mean_kl: float
    """Highest `mean_kl` that was allowed."""
    min_top1_agreement: float | None = None
    """Lowest `top1_agreement` that was allowed."""
    trained_answer: str | None = None
    """Greedy answer of base model plus adapter to the first prompt."""
    merged_answer: str | None = None
    """Greedy answer of the merged model to the same prompt."""

    def unexplained_loss(self) -> str:
        """Return a warning if the merged model's loss is not the one that training ended with.

        The rows are the same, so the losses differ by what merging does: rounding, and for
        `base` original the weights. The proof measured that on its own rows, as `merged_loss` minus
        the loss on the base weights of training. Allowed are as much again, and three standard
        errors: a KL divergence of k nats per token changes the log likelihood of a token with a
        standard deviation of about sqrt(2 k).
        """
        if self.eval_loss is None or self.trained_eval_loss is None:
            return ""
        trained = self.base_losses.get("dequantized", self.base_losses.get(self.base))
        shift = 0.0
        if trained is not None and self.merged_loss is not None:
            shift = self.merged_loss - trained
        size = max(self.mean_kl, abs(shift))
        bound = LOSS_ROUNDING + size + 3 * math.sqrt(2 * size / self.num_eval_tokens)
        if abs(self.eval_loss - self.trained_eval_loss - shift) <= bound:
            return ""
        expected = self.trained_eval_loss + shift
        return (
            f"the merged model's loss on training's evaluation rows is {self.eval_loss:.4f} nats "
            f"per token, but training ended with {self.trained_eval_loss:.4f}, and merging "
            f"explains only {expected - bound:.4f} to {expected + bound:.4f}. Likely causes: "
            "training computed with other weights than those that it saved or that were merged, or "
            "with other kernels (compare with train.kernels off). Train again before you rely on "
            "the scores"
        )


class ImportanceMatrix(Record):
    """An importance matrix: statistics of the inputs of each weight, measured on training rows."""

    filename: ClassVar[str] = "importance.json"
    role: ClassVar[str] = "importance"
    required_ancestors: ClassVar[tuple[str, ...]] = ("dataset", "merged")

    file: str
    """Name of the file with the matrix, in the format that llama-imatrix writes."""
    num_rows: int
    num_tokens: int
    num_tensors: int


class BenchmarkAnswers(StrictModel):
    """Which held-out rows an export and the merged model answered correctly.

    Each list has one entry per row, in the order of the file of held-out rows.
    """

    export: list[bool]
    merged: list[bool]
    clusters: list[int]
    """Number of each row's cluster, from 0 without gaps."""


class QuantizedModel(Record):
    """One export of the merged model."""

    filename: ClassVar[str] = "quantized.json"
    role: ClassVar[str] = "export"
    required_ancestors: ClassVar[tuple[str, ...]] = ("merged",)

    format: str
    """Format of the export, a key of `quantize.formats.FORMATS`."""
    kind: ExportKind
    file: str
    """Name of the .gguf file in the directory; "." if the whole directory is a checkpoint."""
    num_bytes: int
    bits_per_weight: float
    group_size: int | None = None
    """Number of weights that share a scale; GPTQ and AWQ only."""
    vllm_has_kernel: bool | None = None
    """Whether vLLM has a kernel for the export's bits per weight and group size; null for GGUF."""
    num_importance_rows: int = 0
    """Number of training rows that the importance matrix was measured on; 0 if no matrix was used.
    GGUF only."""
    tensor_types: dict[str, int] = Field(default_factory=dict)
    """Number of tensors of each type."""
    notes: list[str] = Field(default_factory=list)
    """Remarks for the user, e.g. that some tensors have another type than the format's."""
    prompt: str
    """Prompt of the check that the export loads and generates."""
    generated: str
    """Greedy answer of the export to `prompt`."""
    reference: str | None = None
    """Greedy answer of the merged model to `prompt`; null if the merged model was not run."""
    mean_kl: float | None = None
    """Mean KL divergence per token of the export from the merged model, in nats, over `num_prompts`
    rows."""
    max_mean_kl: float | None = None
    """Highest `mean_kl` that was allowed."""
    top1_agreement: float | None = None
    """Fraction of positions at which the export and the merged model have the same most likely
    token, 0 to 1."""
    min_top1_agreement: float | None = None
    """Lowest `top1_agreement` that was allowed."""
    perplexity: float | None = None
    """Perplexity of the export on the answers of the `num_prompts` rows."""
    reference_perplexity: float | None = None
    """Perplexity of the merged model on the same answers."""
    num_prompts: int = 0
    """Number of rows compared. These are held-out rows if the dataset has any."""
    benchmark: str | None = None
    """Name of the evaluation task that the export was scored on."""
    benchmark_score: float | None = None
    """Fraction of correct answers on `num_benchmark_rows` held-out rows, 0 to 1."""
    reference_benchmark_score: float | None = None
    """Fraction of correct answers of the merged model on the same rows."""
    num_benchmark_rows: int = 0
    benchmark_answers: BenchmarkAnswers | None = None
    """The answers behind the two scores, from which the gate decides whether the export is
    published; null if the export was not scored."""
    num_tokenizer_texts: int | None = None
    """Number of texts that llama.cpp and the merged model's tokenizer split alike; GGUF only."""
    num_conversations: int | None = None
    """Number of conversations that both chat templates render alike; GGUF only."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Tokens that end an answer, in the export and in the merged model."""
    tokens_per_second: float | None = None
    """Generation speed on a CPU, for one sequence."""
    num_context: int | None = None
    """Context length that the file was checked at, and that Ollama's files name; GGUF only."""
    num_threads: int | None = None
    """Number of CPU threads that generated when `tokens_per_second` was measured."""

    def loss_of_tuning(self, merge: MergeProof) -> str:
        """Return a warning if the export is far from the merged model, compared with the tuning.

        Small bounds would hold back every export of a model that was tuned a little, and the bounds
        of few bits are wide: an export can meet them without the adapter. The measure that fits all
        is the distance that the tuning itself moved the model.

        Args:
            merge: record of the merged model.
        """
        if not self.mean_kl or not merge.tuning_kl:
            return ""
        share = self.mean_kl / merge.tuning_kl
        if share <= MAX_SHARE_OF_TUNING:
            return ""
        return (
            f"{self.format} is {self.mean_kl:.2g} nats per token from the merged model, and the "
            f"tuning moved the base model by {merge.tuning_kl:.2g}: the export may have lost much "
            "of what was learnt. Take a format with more bits"
        )
