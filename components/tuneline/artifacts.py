"""The artifacts that steps pass to each other: directories, file names, and their JSON records.

Every artifact directory holds one JSON record, which is written last. A directory without a record
is not an artifact. Records are strict: a step that reads a record with an unknown key or without a
required key fails at once.

The steps that make base_model, dataset, adapter, merged and quantized also pass on a copy of the
record as an artifact of its own, a single JSON file named `record`. Report takes only these copies,
and publish takes them for what it does not upload, because KFP downloads every input in full.

    artifact     record            other files
    -----------  ----------------  -----------------------------------------------------------
    base_model   origin.json       config.json, *.safetensors, tokenizer files
    dataset      dataset.json      train.parquet, eval.parquet, heldout.jsonl, rejected.jsonl,
                                    chat_template.jinja
    adapter      training.json     adapter_config.json, adapter_model.safetensors, tokenizer,
                                    progress.jsonl
    merged       merge.json        config.json, *.safetensors, tokenizer files
    importance   importance.json   importance.gguf, for llama.cpp's quantisers
    quantized    quantized.json    one .gguf file and its Modelfile, or a checkpoint
    scores       scores.json       samples/<task>.jsonl, prompted/<task>.jsonl,
                                    generations.jsonl
    decision     decision.json     evaluated.json, for the next run to the same target
    summary      summary.json
    published    published.json
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from tuneline.dataset_record import Contamination as Contamination
from tuneline.dataset_record import DatasetManifest as DatasetManifest
from tuneline.dataset_record import DatasetSource as DatasetSource
from tuneline.dataset_record import LengthStatistics as LengthStatistics
from tuneline.dataset_record import Method as Method
from tuneline.errors import OutputExistsError, WorldError
from tuneline.kinds import EXPORT_KINDS
from tuneline.record import BASE_MODEL, Ancestor, Record
from tuneline.records.exports import BenchmarkAnswers as BenchmarkAnswers
from tuneline.records.exports import ImportanceMatrix as ImportanceMatrix
from tuneline.records.exports import MergeProof as MergeProof
from tuneline.records.exports import QuantizedModel as QuantizedModel
from tuneline.records.published import Bundle as Bundle
from tuneline.records.published import Published as Published
from tuneline.records.published import PublishedRepo as PublishedRepo
from tuneline.records.published import RunSummary as RunSummary
from tuneline.records.scores import ComparisonRole as ComparisonRole
from tuneline.records.scores import Decision as Decision
from tuneline.records.scores import ExportVerdict as ExportVerdict
from tuneline.records.scores import Scores as Scores
from tuneline.records.scores import TaskComparison as TaskComparison
from tuneline.records.scores import TaskScore as TaskScore
from tuneline.records.scores import Verdict as Verdict
from tuneline.runtime.scratch import scratch_directory
from tuneline.strict_model import StrictModel

TRAIN_FILE = "train.parquet"
EVAL_FILE = "eval.parquet"
HELDOUT_FILE = "heldout.jsonl"
REJECTED_FILE = "rejected.jsonl"
# In the directory of an adapter: one JSON object per logged training step.
PROGRESS_FILE = "progress.jsonl"
# In a dataset if the recipe names a template, which replaces the template of the tokenizer.
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# In the directory of a GGUF file, for Ollama.
MODELFILE = "Modelfile"
OLLAMA_TEMPLATE = "template"
OLLAMA_PARAMS = "params"
# In every published repository: what the repository was made from, and the hashes of its files.
PUBLISHED_BUNDLE = "tuneline.json"
SAMPLES_DIR = "samples"
# Scores of the samples with training rows in the prompt; in the scores of the base model.
PROMPTED_DIR = "prompted"
GENERATIONS_FILE = "generations.jsonl"
# A task in every evaluation with held-out rows: how much likelier an answer is after its own prompt
# than after the prompt of another row.
PROMPT_CONTROL = "prompt_dependence"

# Columns of train.parquet and eval.parquet for the methods sft and cpt: the token IDs (lists of
# int32), and for each token whether it counts in the loss (lists of int8).
INPUT_IDS = "input_ids"
LOSS_MASK = "loss_mask"
# Columns for the methods dpo and kto, which hold token IDs. The answers do not include the prompt.
# KTO has one answer per row, and whether the answer is desirable (a boolean).
PROMPT_IDS = "prompt_ids"
CHOSEN_IDS = "chosen_ids"
REJECTED_IDS = "rejected_ids"
COMPLETION_IDS = "completion_ids"
LABEL = "label"
COLUMNS: dict[Method, tuple[str, ...]] = {
    "sft": (INPUT_IDS, LOSS_MASK),
    "dpo": (PROMPT_IDS, CHOSEN_IDS, REJECTED_IDS),
    "kto": (PROMPT_IDS, COMPLETION_IDS, LABEL),
    "cpt": (INPUT_IDS, LOSS_MASK),
}
"""Columns of train.parquet and eval.parquet, by training method."""
PREFERENCE_METHODS = frozenset({"dpo", "kto"})
"""Methods that compare the likelihood of whole answers with that under the base model. Their
examples are padded, not packed."""


class RunHeader(StrictModel):
    """A recipe as report and publish read it: only the keys that they use are fields.

    `Recipe` imports the config of every step, so a step cannot use that class. The pipeline
    validates the recipe and passes it to the steps as JSON. `model_dump` returns all keys of the
    recipe, in their order.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    description: str = ""
    base_model: str
    dataset: str | None = None
    datasets: list[dict[str, Any]] = Field(default_factory=list)
    publish_to: str | list[str]

    def check_exports(self, formats: Iterable[str], quantize_config: str | None = None) -> None:
        """Check that a step got every export that the run asks for.

        Args:
            formats: formats of the exports that the step got.
            quantize_config: the section `quantize` of the run as JSON. None: that of the recipe.

        Raises:
            WorldError: exports are missing.
        """
        quantize = (self.model_extra or {}).get("quantize", {})
        if quantize_config is not None:
            quantize = json.loads(quantize_config)
        asked = [format for kind in EXPORT_KINDS for format in quantize.get(kind, ())]
        got = set(formats)
        missing = [format for format in asked if format not in got]
        if missing:
            raise WorldError(
                f"the run asks for {len(asked)} exports ({', '.join(asked)}), but this step did "
                f"not get {', '.join(missing)}, so nothing was written. Run the pipeline again; if "
                "the same exports are missing, compile the recipe again with this tuneline"
            )


class ModelOrigin(Record):
    """Where a base model came from."""

    filename: ClassVar[str] = "origin.json"
    role: ClassVar[str] = BASE_MODEL

    source: str
    """The source as the recipe names it: a Hub ID, a directory, a GGUF file or builtin:NAME."""
    revision: str | None = None
    """Hub commit that the recipe's revision refers to; null for a local source."""
    licence: str | None = None
    """Identifier of the licence, similar to SPDX; null if the source names no licence."""
    architecture: str
    """Name of the model class, from `architectures` in config.json."""
    num_parameters: int
    num_bytes: int
    """Size of the weight files, in bytes."""
    sha256: str
    """SHA-256 over the names and contents of the weight files."""
    runs_own_code: bool = False
    """Whether loading runs code of the source (trust_remote_code), which the recipe must allow."""
    quantization: str | None = None
    """How the source's weights are quantised, e.g. "bitsandbytes nf4" or "fp8"; null: they are not.
    """
    dequantized: bool = False
    """Whether fetch converted quantised weights to bfloat16. Otherwise training uses them as they
    are."""

    @property
    def stored_as(self) -> str:
        """What was done with quantised weights, for readers; "" if they are not quantised."""
        if self.quantization is None:
            return ""
        if self.dequantized:
            return f"{self.quantization}, converted to bfloat16 before training"
        return f"{self.quantization}, trained on as it is"

    def as_ancestor(self) -> Ancestor:
        """Return the entry with the revision and the hash of the weights instead of all files."""
        ancestor = super().as_ancestor()
        return ancestor.model_copy(update={"sha256": self.sha256, "revision": self.revision})


class TrainingPoint(StrictModel):
    """Values logged at one training step; null if a value was not measured at the step."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None


class TrainingSummary(Record):
    """How an adapter was trained. training_figures.py says which values are shown to users."""

    filename: ClassVar[str] = "training.json"
    role: ClassVar[str] = "adapter"
    required_ancestors: ClassVar[tuple[str, ...]] = ("base_model", "dataset")

    method: Method
    num_steps: int
    num_tokens: int
    """Number of tokens trained on, without padding."""
    final_loss: float
    """Last logged training loss."""
    first_eval_loss: float | None = None
    """Evaluation loss before the first step."""
    final_eval_loss: float | None = None
    """Evaluation loss of the saved adapter."""
    num_trainable_parameters: int
    num_parameters: int
    base_quantization: Literal["nf4", "fp4", "none"]
    """Number format of the base weights during training; fp4: the base model's files hold it."""
    quantized_fraction: float | None = None
    """Fraction of the base model's parameters that training held in 4 bits; null in a record of an
    older version."""
    experts_quantized: bool = False
    """Whether these include routed experts, which bitsandbytes in plain transformers leaves in 16
    bits."""
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
    """Energy that the GPUs used during training, in kWh; null if NVML does not report it."""
    cost: float | None = None
    """`device_hours` times the recipe's price per hour; null if the recipe names no price."""
    estimated_peak_bytes: int | None = None
    """Estimate of `peak_memory_bytes`, made before the model was loaded."""
    fitted: str = ""
    """Settings of the recipe that were changed so that training fits into memory; "" for none."""
    num_out_of_memory: int = 0
    """How often memory ran out. Training resumed with a smaller micro-batch each time."""
    history: list[TrainingPoint]
    learning_rate: float | None = None
    """Highest learning rate of the schedule; if the recipe says auto, the chosen rate."""
    best_step: int | None = None
    """Step with the lowest evaluation loss; its adapter was saved."""
    stopped_early: bool = False
    """Whether training ended early because the evaluation loss no longer improved."""
    eval_gap: float | None = None
    """Last evaluation loss minus the mean training loss since the previous evaluation. The gap
    grows when the model memorises its training rows."""
    num_skipped_steps: int = 0
    """Number of steps skipped because the loss or the gradient was not finite."""
    num_rollbacks: int = 0
    """How often training went back to a checkpoint, with a lower learning rate, after several
    skipped steps."""
    num_resumptions: int = 0
    """How often training resumed from a checkpoint after an interruption, restarts included."""
    num_restarts: int = 0
    """How often the step started new processes because a rank had died, or had failed with an error
    of the GPU, its driver or the connection between ranks."""
    base_sha256: str
    dataset_sha256: str


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Create an output directory whose content appears all at once, or not at all.

    Yields a temporary directory next to `path` to write into, and renames it to `path` on success.
    On an error, the temporary directory is removed and `path` is left as it was. That of a process
    that was killed is removed by the next one that makes the same output.

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
    with scratch_directory(path.parent, prefix=f".{path.name}.") as partial:
        yield partial
        # Another pod may run as another user, but mkdtemp sets 0700, and safetensors 0600.
        partial.chmod(0o755)
        for weights in partial.rglob("*.safetensors"):
            if not weights.is_symlink() and not weights.stat().st_mode & 0o044:
                weights.chmod(0o644)
        partial.replace(path)


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
    """Return a single SHA-256 over the names and contents of all files."""
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
"""Names of the files that describe one artifact and must not be copied into another one."""
