"""What the steps hand each other: directories, their file names, and the record in each.

Every artifact directory holds one JSON record, written last. A directory without its record is
not an artifact. Records are strict: a producer and a consumer that disagree fail at once.

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
    published    published.json    for a `dir:` target: the trees that would be pushed
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from tuneline.errors import OutputExistsError
from tuneline.record import Ancestor, Record
from tuneline.strict_model import StrictModel

TRAIN_FILE = "train.parquet"
EVAL_FILE = "eval.parquet"
HELDOUT_FILE = "heldout.jsonl"
REJECTED_FILE = "rejected.jsonl"
# Beside an adapter: one JSON object a logged step.
PROGRESS_FILE = "progress.jsonl"
# Beside the data set when the recipe names a template: it replaces the tokenizer's own.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# For Ollama, beside a GGUF file.
MODELFILE = "Modelfile"
# In every published repository: what it was made from, and the hashes of its files.
PUBLISHED_BUNDLE = "tuneline.json"
SAMPLES_DIR = "samples"
GENERATIONS_FILE = "generations.jsonl"

# Columns of train.parquet and eval.parquet for the methods sft and cpt: lists of int32, int8.
INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"
# And for dpo: prompt, chosen and rejected token ids; the prompt is in neither of the others.
PROMPT_IDS = "prompt_ids"
CHOSEN_IDS = "chosen_ids"
REJECTED_IDS = "rejected_ids"

Method = Literal["sft", "dpo", "cpt"]
Verdict = Literal["promote", "hold"]


class ModelOrigin(Record):
    """Where a base model came from."""

    filename: ClassVar[str] = "origin.json"
    role: ClassVar[str] = "base_model"

    source: str
    """As the recipe names it: a Hub id, a directory, a GGUF file or builtin:NAME."""
    revision: str | None = None
    """The Hub commit that a revision was resolved to; none for local sources."""
    licence: str | None = None
    """SPDX-like identifier, where the source says."""
    architecture: str
    """The class in config.json's `architectures`."""
    num_parameters: int
    num_bytes: int
    """Size of the weight files."""
    sha256: str
    """Hash over the names and contents of the weight files."""
    runs_own_code: bool = False
    """Whether loading needs trust_remote_code, which the recipe gave by name."""

    def as_ancestor(self) -> Ancestor:
        """Return the hash that is known before the model is fetched, and the revision."""
        kept = super().as_ancestor()
        return kept.model_copy(update={"sha256": self.sha256, "revision": self.revision})


class LengthStatistics(StrictModel):
    """Lengths of the rows in tokens, before truncation."""

    mean: float
    median: float
    p95: float
    p99: float
    max: int
    histogram: list[tuple[int, int, int]] = Field(default_factory=list)
    """Bins (from, below, number of rows)."""


class DatasetManifest(Record):
    """What a prepared data set holds."""

    filename: ClassVar[str] = "dataset.json"
    role: ClassVar[str] = "dataset"

    source: str
    method: Method
    format: str
    """alpaca, messages, sharegpt, prompt-completion, preference or text."""
    template: str
    """The chat template's name: tokenizer, alpaca, chatml, llama3, or none."""
    loss_on: str
    """answers or all."""
    num_train_rows: int
    num_eval_rows: int
    num_heldout_rows: int
    num_rejected_rows: int
    num_tokens: int
    """Tokens in train.parquet."""
    num_loss_tokens: int
    """Tokens in train.parquet that the loss counts."""
    lengths: LengthStatistics
    max_seq_length: int
    recommended_max_seq_length: int
    truncated_token_share: float
    """Share of all tokens that truncation to max_seq_length loses, 0 to 1."""
    num_overlong_rows: int = 0
    """Rows left out because truncation would leave no token to learn."""
    num_general_rows: int = 0
    """Training rows that come from the general data set."""
    num_leaking_rows: int = 0
    """Rows left out because a held-out row is the same."""
    end_of_turn: str = ""
    """What the template puts after an answer, e.g. <|im_end|>: where generation has to stop."""
    licence: str | None = None
    sha256: str
    """Hash of the checked rows in order, of the template and of the split."""

    def as_ancestor(self) -> Ancestor:
        """Return the hash of the rows, which other names and compressions do not change."""
        return super().as_ancestor().model_copy(update={"sha256": self.sha256})


class TrainingPoint(StrictModel):
    """One logged step; a value that was not measured then is null."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None


class TrainingSummary(Record):
    """How an adapter was trained."""

    filename: ClassVar[str] = "training.json"
    role: ClassVar[str] = "adapter"

    method: Method
    num_steps: int
    num_tokens: int
    """Tokens that went through the model, padding not counted."""
    final_loss: float
    first_eval_loss: float | None = None
    """Before the first step."""
    final_eval_loss: float | None = None
    num_trainable_parameters: int
    num_parameters: int
    base_quantization: Literal["nf4", "none"]
    compute_dtype: str
    kernels: str = "off"
    """What our kernels took over, in a sentence."""
    device: str
    num_ranks: int = 1
    """Processes that trained together, each on a device of its own."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Peak of the device's allocator, or resident memory of the process on a CPU."""
    device_hours: float | None = None
    """Hours of all devices in training, evaluations included: GPU-hours on GPUs."""
    energy_kwh: float | None = None
    """What the GPUs took in that time, where NVML says it."""
    cost: float | None = None
    """device_hours at the recipe's price."""
    estimated_peak_bytes: int | None = None
    """What `peak_memory_bytes` was estimated to be before the model was loaded."""
    fitted: str = ""
    """What was changed in the recipe's settings so that the run fits its memory."""
    num_out_of_memory: int = 0
    """How often memory ran out, and the run went on from a checkpoint with a smaller batch."""
    history: list[TrainingPoint]
    learning_rate: float | None = None
    """The schedule's highest: what `auto` came to."""
    best_step: int | None = None
    """The step whose adapter was kept: the one with the lowest evaluation loss."""
    stopped_early: bool = False
    eval_gap: float | None = None
    """How far the evaluation loss of the last evaluation was above the mean training loss since the
    one before it: it grows when a model learns its rows by heart."""
    num_skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    num_rollbacks: int = 0
    """How often too many of them in a row sent the run back, to go on with a lower rate."""
    num_resumptions: int = 0
    """How often the run was continued from a checkpoint."""
    base_sha256: str
    dataset_sha256: str


class MergeProof(Record):
    """How the merged model was made, and how far it is from base plus adapter."""

    filename: ClassVar[str] = "merge.json"
    role: ClassVar[str] = "merged"

    base: Literal["dequantized", "original"]
    """Which base weights the adapter was added to."""
    base_asked: Literal["dequantized", "original", "auto"] | None = None
    """What the recipe said; auto takes the base with the lower loss."""
    base_losses: dict[str, float] = Field(default_factory=dict)
    """Loss of base plus adapter on the rows' answers, nats a token, by each base measured."""
    merged_loss: float | None = None
    """Of the merged model on the same."""
    dtype: str
    num_bytes: int
    num_shards: int
    num_merged_modules: int
    num_prompts: int
    max_logit_difference: float
    """Largest absolute difference of a logit, adapter on base against merged."""
    mean_kl: float
    """Mean KL divergence a token, in nats."""
    top1_agreement: float
    """Share of positions with the same most likely token, 0 to 1."""
    max_mean_kl: float
    """The bound that mean_kl was held against."""
    min_top1_agreement: float | None = None
    """The bound that top1_agreement was held against."""
    trained_answer: str | None = None
    """What base plus adapter say to the first prompt, greedily."""
    merged_answer: str | None = None
    """What the merged model says to it."""


class ImportanceMatrix(Record):
    """Which inputs of each weight matter, measured on training rows."""

    filename: ClassVar[str] = "importance.json"
    role: ClassVar[str] = "importance"

    file: str
    """In the format of llama-imatrix."""
    num_rows: int
    num_tokens: int
    num_tensors: int


class QuantizedModel(Record):
    """One export of the merged model."""

    filename: ClassVar[str] = "quantized.json"
    role: ClassVar[str] = "export"

    format: str
    """f16, bf16, q8_0, q5_k_m, q4_k_m, ... or gptq-4bit, ..."""
    kind: Literal["gguf", "gptq"]
    file: str
    """Name of the .gguf file in the directory; "." where the directory is the checkpoint."""
    num_bytes: int
    bits_per_weight: float
    group_size: int | None = None
    """GPTQ only."""
    vllm_has_kernel: bool | None = None
    """GPTQ only: whether vLLM serves such bits and groups."""
    num_importance_rows: int = 0
    """Training rows of the importance matrix that it was rounded by; GGUF only."""
    tensor_types: dict[str, int] = Field(default_factory=dict)
    """How many tensors have each type."""
    notes: list[str] = Field(default_factory=list)
    """What a reader should know: fallbacks, a smaller group size."""
    prompt: str
    """The prompt of the load-and-generate check."""
    generated: str
    """What the loaded file generated, greedily."""
    reference: str | None = None
    """What the merged model generated from the same prompt, where it was run beside."""
    mean_kl: float | None = None
    """Mean KL divergence a token from the merged model, in nats, over `num_prompts` rows."""
    max_mean_kl: float | None = None
    """The bound that mean_kl was held against."""
    top1_agreement: float | None = None
    """Share of positions with the merged model's most likely token, 0 to 1."""
    min_top1_agreement: float | None = None
    """The bound that top1_agreement was held against."""
    perplexity: float | None = None
    """Of the export on the rows' answers."""
    reference_perplexity: float | None = None
    """Of the merged model on the same."""
    num_prompts: int = 0
    """Rows compared, held-out ones where there are any."""
    benchmark: str | None = None
    """The evaluate step's name of the task that the export was scored on."""
    benchmark_score: float | None = None
    """Share of right answers on `num_benchmark_rows` held-out rows, 0 to 1."""
    reference_benchmark_score: float | None = None
    """The merged model's on the same."""
    num_benchmark_rows: int = 0
    num_tokenizer_texts: int | None = None
    """Texts that llama.cpp splits exactly as the merged model's tokenizer; GGUF only."""
    num_conversations: int | None = None
    """Conversations that the file's chat template renders to the same text; GGUF only."""
    stop_tokens: list[str] = Field(default_factory=list)
    """What ends an answer, in the export as in the merged model."""
    tokens_per_second: float | None = None
    """Generating on a CPU, one sequence."""
    num_threads: int | None = None
    """CPU threads of `tokens_per_second`."""


class TaskScore(StrictModel):
    """One metric of one task."""

    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None = None
    num_samples: int


class Scores(Record):
    """What a benchmark measured on one model."""

    filename: ClassVar[str] = "scores.json"
    role: ClassVar[str] = "scores"

    model: str
    """base, tuned or an export's format."""
    tasks: dict[str, TaskScore]
    """By task name. Per-sample scores: samples/<task>.jsonl, rows {"id": str, "score": float}, with
    "weight": int where a score is a ratio: `value` is the weighted mean of the scores."""
    harness: str
    """Name and version of the benchmark program."""

    def called(self) -> str:
        """Return base_scores or tuned_scores: a decision goes back to both."""
        return f"{self.model}_scores"


class TaskComparison(StrictModel):
    """Tuned against base on the same samples of one task."""

    task: str
    metric: str
    higher_is_better: bool
    base: float
    tuned: float
    difference: float
    """Mean over samples of tuned minus base, turned so that positive is better."""
    interval: tuple[float, float]
    """95 % interval of the difference, paired bootstrap."""
    num_samples: int
    outcome: Literal["better", "worse", "undecided"]
    target: bool
    """Whether the task has to get better; the others must not get worse."""


class Decision(Record):
    """Whether the tuned model may be published, and why."""

    filename: ClassVar[str] = "decision.json"
    role: ClassVar[str] = "decision"

    verdict: Verdict
    reason: str
    comparisons: list[TaskComparison]


class PublishedRepo(StrictModel):
    """One repository that was written."""

    repo: str
    """Hub id, or a path below the target directory."""
    kind: Literal["adapter", "merged", "gguf", "gptq"]
    url: str
    commit: str | None = None
    """The revision that holds exactly this content; none below a directory."""
    tag: str | None = None
    """v1, v2, ...: a name for that revision."""
    num_files: int
    num_bytes: int


class Published(Record):
    """What was published where."""

    filename: ClassVar[str] = "published.json"
    role: ClassVar[str] = "published"

    target: str
    private: bool
    repos: list[PublishedRepo]

    def metadata(self) -> dict[str, str]:
        """Return where each repository is and its revision, for an artifact's metadata."""
        found = {}
        for repo in self.repos:
            # Of several GPTQ checkpoints each has a repository, named for its format.
            gptq = repo.repo.rpartition("gptq-")[2]
            key = f"gptq-{gptq}" if repo.kind == "gptq" else repo.kind
            found[key] = repo.url
            if repo.commit:
                found[f"{key}_revision"] = repo.commit
            if repo.tag:
                found[f"{key}_tag"] = repo.tag
        return found


class RunSummary(Record):
    """What a run came to, for tables and scripts."""

    filename: ClassVar[str] = "summary.json"
    role: ClassVar[str] = "summary"

    recipe: str
    """The recipe's name."""
    verdict: Verdict
    reason: str
    comparisons: list[TaskComparison]
    exports: list[QuantizedModel]


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Make an output directory that appears whole or not at all.

    Yields a directory beside `path` to write into, and renames it to `path` on success. On an
    error nothing is left behind and nothing that stood at `path` is touched.

    Raises:
        OutputExistsError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputExistsError(
            f"the output {path} exists and is not empty: name a new directory, "
            "or remove it if you do not need it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes 0700, which another pod's user could not read
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_jsonl(path: str | Path) -> list[dict]:
    """Read one of our own JSON Lines files."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write rows as JSON Lines."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sha256_of(paths: list[Path]) -> str:
    """Return one hash over the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


KINDS: tuple[type[Record], ...] = (
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
"""Records of artifacts, in the order in which a run makes them."""

RECORD_FILES = frozenset(kind.filename for kind in KINDS) | {PUBLISHED_BUNDLE}
"""Names of files that belong to one artifact, and mean nothing beside another's files."""
