"""The artifacts that steps hand to each other: directories, file names, and the record in each.

Every artifact directory holds one JSON record, which is written last. A directory without a record
is not an artifact. Records are strict: a step that reads an unknown or a missing key fails at once.

    artifact     record            other files
    -----------  ----------------  -----------------------------------------------------------
    base_model   origin.json       config.json, *.safetensors, tokenizer files
    dataset      dataset.json      train.parquet, eval.parquet, heldout.jsonl, rejected.jsonl,
                                    chat_template.jinja
    adapter      training.json     adapter_config.json, adapter_model.safetensors, tokenizer,
                                    progress.jsonl
    merged       merge.json        config.json, *.safetensors, tokenizer files
    importance   importance.json   importance.gguf, for llama.cpp's quantisers
    quantized    quantized.json    one .gguf file and its Modelfile, or a GPTQ checkpoint
    scores       scores.json       samples/<task>.jsonl, generations.jsonl
    decision     decision.json
    summary      summary.json
    published    published.json
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from tuneline.errors import OutputExistsError
from tuneline.kinds import KINDS, ExportKind, RepoKind
from tuneline.record import Ancestor, Record
from tuneline.strict_model import StrictModel

TRAIN_FILE = "train.parquet"
EVAL_FILE = "eval.parquet"
HELDOUT_FILE = "heldout.jsonl"
REJECTED_FILE = "rejected.jsonl"
# Next to an adapter: one JSON object per logged step.
PROGRESS_FILE = "progress.jsonl"
# In a dataset whose recipe names a template; it replaces the tokenizer's own template.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# Next to a GGUF file, for Ollama.
MODELFILE = "Modelfile"
# In every published repository: what the repository was made from, and its files' hashes.
PUBLISHED_BUNDLE = "tuneline.json"
SAMPLES_DIR = "samples"
GENERATIONS_FILE = "generations.jsonl"

# Columns of train.parquet and eval.parquet for the methods sft and cpt: lists of int32 and int8.
INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"
# The columns for dpo hold token IDs. The prompt is repeated in neither of the two answers.
PROMPT_IDS = "prompt_ids"
CHOSEN_IDS = "chosen_ids"
REJECTED_IDS = "rejected_ids"

Method = Literal["sft", "dpo", "cpt"]
Verdict = Literal["promote", "hold"]


class RunHeader(StrictModel):
    """The keys of a recipe that the report and the model cards read; other keys are kept as data.

    `Recipe` imports the config of every step, so a step cannot use it. The pipeline validates the
    recipe and passes it on as JSON; `model_dump` returns all of its keys in the same order.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    description: str = ""
    base_model: str
    dataset: str
    publish_to: str


class ModelOrigin(Record):
    """Where a base model came from."""

    filename: ClassVar[str] = "origin.json"
    role: ClassVar[str] = "base_model"

    source: str
    """The source as the recipe names it: a Hub ID, a directory, a GGUF file or builtin:NAME."""
    revision: str | None = None
    """Hub commit that the revision was resolved to; null for a local source."""
    licence: str | None = None
    """SPDX-like identifier; null where the source names no licence."""
    architecture: str
    """Class name in config.json's `architectures`."""
    num_parameters: int
    num_bytes: int
    """Size of the weight files, in bytes."""
    sha256: str
    """SHA-256 over the names and contents of the weight files."""
    runs_own_code: bool = False
    """Whether loading needs trust_remote_code, which the recipe has to allow by name."""

    def as_ancestor(self) -> Ancestor:
        """Return the hash of the weights, which other files do not change, and the revision."""
        ancestor = super().as_ancestor()
        return ancestor.model_copy(update={"sha256": self.sha256, "revision": self.revision})


class LengthStatistics(StrictModel):
    """Lengths of the rows before truncation, in tokens."""

    mean: float
    median: float
    p95: float
    p99: float
    max: int
    histogram: list[tuple[int, int, int]] = Field(default_factory=list)
    """Bins of (lowest length, first length above the bin, number of rows)."""


class DatasetManifest(Record):
    """Contents of a prepared dataset."""

    filename: ClassVar[str] = "dataset.json"
    role: ClassVar[str] = "dataset"

    source: str
    method: Method
    format: str
    """Format of the rows, a key of `prepare.formats.table.FORMATS`."""
    template: str
    """Name of the chat template: a value of `prepare.template`, or none for continued
    pre-training."""
    loss_on: str
    """Tokens that count in the loss: answers or all."""
    num_train_rows: int
    num_eval_rows: int
    num_heldout_rows: int
    num_rejected_rows: int
    num_tokens: int
    """Number of tokens in train.parquet."""
    num_loss_tokens: int
    """Number of tokens in train.parquet that count in the loss."""
    lengths: LengthStatistics
    max_seq_length: int
    recommended_max_seq_length: int
    truncated_token_share: float
    """Fraction of all tokens that truncation to max_seq_length removes, 0 to 1."""
    num_overlong_rows: int = 0
    """Number of rows left out because truncation would leave no token that counts in the loss."""
    num_general_rows: int = 0
    """Number of training rows that come from the general dataset."""
    num_leaking_rows: int = 0
    """Number of rows left out because they equal a held-out row."""
    end_of_turn: str = ""
    """Text that the template puts after an answer, e.g. <|im_end|>; generation stops there."""
    licence: str | None = None
    sha256: str
    """SHA-256 over the checked rows in order, the template and the split."""

    def as_ancestor(self) -> Ancestor:
        """Return the hash of the rows, which file names and compression do not change."""
        return super().as_ancestor().model_copy(update={"sha256": self.sha256})


class TrainingPoint(StrictModel):
    """One logged step; a value that was not measured at this step is null."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None


class TrainingSummary(Record):
    """How an adapter was trained. `training_figures` lists the figures that pages show."""

    filename: ClassVar[str] = "training.json"
    role: ClassVar[str] = "adapter"

    method: Method
    num_steps: int
    num_tokens: int
    """Number of tokens trained on, without padding."""
    final_loss: float
    """Last logged training loss."""
    first_eval_loss: float | None = None
    """Evaluation loss before the first step."""
    final_eval_loss: float | None = None
    """Evaluation loss of the adapter that was kept."""
    num_trainable_parameters: int
    num_parameters: int
    base_quantization: Literal["nf4", "none"]
    compute_dtype: str
    kernels: str = "off"
    """A sentence that says which operations ran in tuneline's kernels."""
    device: str
    num_ranks: int = 1
    """Number of training processes, each with its own device."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Peak of the device's allocator, or of the process's resident memory on a CPU, in bytes."""
    device_hours: float | None = None
    """Device time of training, over all ranks and with evaluations, in hours."""
    energy_kwh: float | None = None
    """Energy that the GPUs used during training, in kWh; null where NVML does not report it."""
    cost: float | None = None
    """`device_hours` times the recipe's price per hour; null where the recipe names no price."""
    estimated_peak_bytes: int | None = None
    """Estimate of `peak_memory_bytes` from before the model was loaded."""
    fitted: str = ""
    """Settings of the recipe that were changed so that training fits into memory; "" for none."""
    num_out_of_memory: int = 0
    """How often memory ran out; training then resumed with a smaller micro-batch."""
    history: list[TrainingPoint]
    learning_rate: float | None = None
    """Highest learning rate of the schedule: the one that was chosen where the recipe says auto."""
    best_step: int | None = None
    """Step with the lowest evaluation loss, whose adapter was kept."""
    stopped_early: bool = False
    """Whether training stopped because the evaluation loss no longer improved."""
    eval_gap: float | None = None
    """Last evaluation loss minus the mean training loss since the previous evaluation. The gap
    grows when the model memorises its training rows."""
    num_skipped_steps: int = 0
    """Number of steps skipped because the loss or the gradient was not finite."""
    num_rollbacks: int = 0
    """How often training returned to a checkpoint with a lower rate after several skipped steps."""
    num_resumptions: int = 0
    """How often training resumed from a checkpoint after an interruption."""
    base_sha256: str
    dataset_sha256: str


class MergeProof(Record):
    """How the merged model was made, and how far it differs from base model plus adapter."""

    filename: ClassVar[str] = "merge.json"
    role: ClassVar[str] = "merged"

    base: Literal["dequantized", "original"]
    """Base weights that the adapter was added to: as training saw them, or the original ones."""
    base_asked: Literal["dequantized", "original", "auto"] | None = None
    """Setting in the recipe; auto takes the base weights with the lower loss."""
    base_losses: dict[str, float] = Field(default_factory=dict)
    """Loss of base model plus adapter on the answers of the rows, in nats per token, by base."""
    merged_loss: float | None = None
    """Loss of the merged model on the same rows."""
    dtype: str
    num_bytes: int
    num_shards: int
    num_merged_modules: int
    num_prompts: int
    max_logit_difference: float
    """Largest absolute difference of a logit between base model plus adapter and merged model."""
    mean_kl: float
    """Mean KL divergence per token, in nats."""
    top1_agreement: float
    """Fraction of positions with the same most likely token, 0 to 1."""
    max_mean_kl: float
    """Highest `mean_kl` that was allowed."""
    min_top1_agreement: float | None = None
    """Lowest `top1_agreement` that was allowed."""
    trained_answer: str | None = None
    """Greedy answer of base model plus adapter to the first prompt."""
    merged_answer: str | None = None
    """Greedy answer of the merged model to the same prompt."""


class ImportanceMatrix(Record):
    """Importance matrix: per-weight statistics of the inputs, measured on training rows."""

    filename: ClassVar[str] = "importance.json"
    role: ClassVar[str] = "importance"

    file: str
    """Name of the file, which has the format of llama-imatrix."""
    num_rows: int
    num_tokens: int
    num_tensors: int


class QuantizedModel(Record):
    """One export of the merged model."""

    filename: ClassVar[str] = "quantized.json"
    role: ClassVar[str] = "export"

    format: str
    """Format of the export, a key of `quantize.formats.FORMATS`."""
    kind: ExportKind
    file: str
    """Name of the .gguf file in the directory; "." where the directory is a checkpoint."""
    num_bytes: int
    bits_per_weight: float
    group_size: int | None = None
    """Weights that share a scale; GPTQ only."""
    vllm_has_kernel: bool | None = None
    """Whether vLLM has a kernel for these bits and this group size; GPTQ only."""
    num_importance_rows: int = 0
    """Number of training rows behind the importance matrix, 0 without one; GGUF only."""
    tensor_types: dict[str, int] = Field(default_factory=dict)
    """Number of tensors by their type."""
    notes: list[str] = Field(default_factory=list)
    """Remarks for the user, such as a fallback type or a smaller group size."""
    prompt: str
    """Prompt of the check that the export loads and generates."""
    generated: str
    """Greedy answer of the export."""
    reference: str | None = None
    """Greedy answer of the merged model to the same prompt; null where it was not run."""
    mean_kl: float | None = None
    """Mean KL divergence per token from the merged model, in nats, over `num_prompts` rows."""
    max_mean_kl: float | None = None
    """Highest `mean_kl` that was allowed."""
    top1_agreement: float | None = None
    """Fraction of positions with the merged model's most likely token, 0 to 1."""
    min_top1_agreement: float | None = None
    """Lowest `top1_agreement` that was allowed."""
    perplexity: float | None = None
    """Perplexity of the export on the answers of the rows."""
    reference_perplexity: float | None = None
    """Perplexity of the merged model on the same answers."""
    num_prompts: int = 0
    """Number of rows compared: held-out rows where the dataset has any."""
    benchmark: str | None = None
    """Name of the evaluation task that the export was scored on."""
    benchmark_score: float | None = None
    """Fraction of correct answers on `num_benchmark_rows` held-out rows, 0 to 1."""
    reference_benchmark_score: float | None = None
    """Fraction of correct answers of the merged model on the same rows."""
    num_benchmark_rows: int = 0
    num_tokenizer_texts: int | None = None
    """Number of texts that llama.cpp and the merged model's tokenizer split alike; GGUF only."""
    num_conversations: int | None = None
    """Number of conversations that both chat templates render alike; GGUF only."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Tokens that end an answer, in the export and in the merged model."""
    tokens_per_second: float | None = None
    """Generation speed on a CPU, for one sequence."""
    num_threads: int | None = None
    """Number of CPU threads behind `tokens_per_second`."""


class TaskScore(StrictModel):
    """One metric of one task."""

    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None = None
    num_samples: int


class Scores(Record):
    """Results of the evaluation of one model."""

    filename: ClassVar[str] = "scores.json"
    role: ClassVar[str] = "scores"

    model: str
    """Which model was evaluated: base, tuned or the format of an export."""
    tasks: dict[str, TaskScore]
    """Scores by task name. samples/<task>.jsonl holds the score of every sample: rows {"id": str,
    "score": float}, with "weight": int where the score is a ratio. `value` is the weighted mean."""
    harness: str
    """Name and version of the evaluation program."""

    def called(self) -> str:
        """Return base_scores or tuned_scores: a decision has both among its ancestors."""
        return f"{self.model}_scores"


class TaskComparison(StrictModel):
    """Comparison of the tuned and the base model on the same samples of one task."""

    task: str
    metric: str
    higher_is_better: bool
    base: float
    tuned: float
    difference: float
    """Mean over the samples of tuned minus base, with the sign that makes positive better."""
    interval: tuple[float, float]
    """95 % interval of the difference, from a paired bootstrap."""
    num_samples: int
    outcome: Literal["better", "worse", "undecided"]
    target: bool
    """Whether the task has to improve; other tasks must not get worse."""


class Decision(Record):
    """Verdict on publishing the tuned model, with its reason and the comparisons."""

    filename: ClassVar[str] = "decision.json"
    role: ClassVar[str] = "decision"

    verdict: Verdict
    reason: str
    comparisons: list[TaskComparison]


class PublishedRepo(StrictModel):
    """One repository that was published."""

    repo: str
    """Hub ID, or a path below the target directory."""
    kind: RepoKind
    url: str
    commit: str | None = None
    """Commit that holds exactly this content; null below a directory."""
    tag: str | None = None
    """Tag of the commit: v1, v2, ..."""
    num_files: int
    num_bytes: int


class Published(Record):
    """What was published, and where."""

    filename: ClassVar[str] = "published.json"
    role: ClassVar[str] = "published"

    target: str
    private: bool
    repos: list[PublishedRepo]

    def metadata(self) -> dict[str, str]:
        """Return the URL, commit and tag of each repository, for an artifact's metadata."""
        metadata = {}
        for repo in self.repos:
            key: str = repo.kind
            if KINDS[repo.kind].has_repo_per_format:
                # The repository's name ends in its format, and a format starts with its kind.
                key = f"{repo.kind}-{repo.repo.rpartition(f'{repo.kind}-')[2]}"
            metadata[key] = repo.url
            if repo.commit:
                metadata[f"{key}_revision"] = repo.commit
            if repo.tag:
                metadata[f"{key}_tag"] = repo.tag
        return metadata


class RunSummary(Record):
    """Result of a run, for tables and scripts."""

    filename: ClassVar[str] = "summary.json"
    role: ClassVar[str] = "summary"

    recipe: str
    """Name of the recipe."""
    verdict: Verdict
    reason: str
    comparisons: list[TaskComparison]
    exports: list[QuantizedModel]


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Create an output directory that appears complete or not at all.

    Yields a temporary directory next to `path` to write into, and renames it to `path` on success.
    On an error, the temporary directory is removed and `path` is left as it was.

    Raises:
        OutputExistsError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputExistsError(
            f"the output {path} exists and is not empty: name a new directory, "
            "or remove this one if you do not need it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp sets 0700, and another pod may run as another user
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file that tuneline wrote."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sha256_of(paths: list[Path]) -> str:
    """Return one SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


RECORDS: tuple[type[Record], ...] = (
    ModelOrigin,
    DatasetManifest,
    TrainingSummary,
    MergeProof,
    ImportanceMatrix,
    QuantizedModel,
    Scores,
    Decision,
    Published,
    RunSummary,
)
"""Classes of records, in the order in which a run writes them."""

RECORD_FILES = frozenset(record.filename for record in RECORDS) | {PUBLISHED_BUNDLE}
"""Names of files that describe one artifact, and are never copied into another one."""
