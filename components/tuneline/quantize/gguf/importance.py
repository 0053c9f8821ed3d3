"""Measure the importance matrix, with which llama.cpp quantises important weights more accurately.

The quantisers minimise the error of a layer's output. For this they need the mean square of each
input of a weight matrix, which is measured here on the recipe's training rows. The method
is that of llama-imatrix: llama.cpp runs the f16 model, and a callback gets the inputs of every
matrix product. As in llama-imatrix, embeddings and output head are left out. Unlike llama-imatrix,
which cuts one long text into chunks, each dataset row is computed as a separate text.
"""

import ctypes
import logging
import time
from pathlib import Path
from typing import Any

import numpy

from tuneline.artifacts import DatasetManifest, ImportanceMatrix, QuantizedModel, new_directory
from tuneline.errors import ModelError, RecipeError, ToolError
from tuneline.quantize import child_process
from tuneline.quantize.calibration import read_rows
from tuneline.quantize.child_process import ADVICE_ON_SIGTERM
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.gguf import importance_file
from tuneline.quantize.gguf.ggml import F32, Tensor, library
from tuneline.quantize.gguf.importance_file import Importance
from tuneline.quantize.machine import num_threads
from tuneline.runtime.signals import raised_on_sigterm

logger = logging.getLogger(__name__)

FILE = "importance.gguf"
MAX_ROW_TOKENS = 512
"""Number of tokens of a row that are used. It limits memory: llama.cpp holds the logits of a whole
batch, [tokens, vocabulary]."""


@raised_on_sigterm(ADVICE_ON_SIGTERM, once=True)
def measure_importance(
    config: QuantizeConfig, *, gguf_dir: str, dataset_dir: str, importance_dir: str
) -> ImportanceMatrix:
    """Check the f16 file, and measure the importance matrix on the first training rows.

    Args:
        config: the `quantize` section of the recipe; `num_importance_rows` is the number of rows.
        gguf_dir: output of `convert`.
        dataset_dir: directory that prepare made.
        importance_dir: directory to create for the matrix and its record.

    Raises:
        RecipeError: `num_importance_rows` is 0.
        DataError: there are no training rows.
        ModelError: the model is a mixture of experts.
        ToolError: llama.cpp cannot run the model.
        WorldError: the f16 file has changed since `convert` made it.
        StoppedError: the process received SIGTERM; no output is kept.
    """
    if not config.num_importance_rows:
        raise RecipeError("quantize.num_importance_rows is 0: an importance matrix needs rows")
    QuantizedModel.read(gguf_dir).check_files(gguf_dir)
    with new_directory(importance_dir) as target:
        return child_process.call(
            measure,
            config,
            gguf_dir=Path(gguf_dir),
            dataset_dir=Path(dataset_dir),
            target=target,
        )


def measure(
    config: QuantizeConfig, *, gguf_dir: Path, dataset_dir: Path, target: Path
) -> ImportanceMatrix:
    """Measure the importance matrix in this process, with an f16 file that has been checked.

    Args:
        config: the `quantize` section of the recipe; `num_importance_rows` is the number of rows.
        gguf_dir: output of `convert`.
        dataset_dir: directory that prepare made.
        target: directory to write the matrix and its record to.
    """
    started = time.monotonic()
    rows = read_rows(
        dataset_dir,
        config.num_importance_rows,
        setting="num_importance_rows",
        purpose="the importance matrix is measured",
    )
    rows = [row[:MAX_ROW_TOKENS] for row in rows if row]
    f16 = QuantizedModel.read(gguf_dir)
    matrix = collect(gguf_dir / f16.file, rows)
    dataset = DatasetManifest.read(dataset_dir)
    importance_file.write(target / FILE, matrix, source=dataset.sha256, num_rows=len(rows))
    record = ImportanceMatrix(
        file=FILE,
        num_rows=len(rows),
        num_tokens=sum(len(row) for row in rows),
        num_tensors=len(matrix),
        seconds=round(time.monotonic() - started, 3),
    )
    record.write(target, config, parents=(dataset, f16))
    logger.info(
        "importance matrix: %d tensors, %d rows, %d tokens, %.1f s",
        record.num_tensors,
        record.num_rows,
        record.num_tokens,
        record.seconds,
    )
    return record


def collect(file: Path, rows: list[list[int]]) -> dict[str, Importance]:
    """Run a GGUF model on rows of token IDs; return statistics of the inputs of each weight matrix.

    Raises:
        ModelError: the model is a mixture of experts.
        ToolError: llama.cpp cannot run the model.
    """
    # Imported here: the parent process imports this module too, and the GPTQ image has no
    # llama.cpp.
    import llama_cpp

    watch = _Watch()
    watching = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(watch)
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    # Do not repack weights: repacked weights are copied to memory instead of mapped from the file.
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
    if not model:
        raise ToolError(
            f"llama.cpp cannot load {file}: its log has the reason; set "
            "quantize.num_importance_rows to 0 to export without an importance matrix"
        )
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(len(row) for row in rows)
        params.n_threads = params.n_threads_batch = num_threads()
        params.cb_eval = watching
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise ToolError(
                f"llama.cpp could not allocate memory for {file}: raise the memory limit of "
                "measure-importance"
            )
        try:
            for row in rows:
                _compute(llama_cpp, context, row)
                watch.check()
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
    return watch.matrix


def _compute(api: Any, context: Any, row: list[int]) -> None:
    api.llama_memory_clear(api.llama_get_memory(context), True)
    batch = api.llama_batch_init(len(row), 0, 1)
    try:
        batch.n_tokens = len(row)
        for index, token in enumerate(row):
            batch.token[index] = token
            batch.pos[index] = index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            # Request all logits: the last layer computes only tokens whose logits are requested.
            batch.logits[index] = True
        if api.llama_decode(context, batch):
            raise ToolError(
                f"llama.cpp could not compute a row of {len(row)} tokens: raise the memory limit "
                "of measure-importance, or set quantize.num_importance_rows to 0"
            )
    finally:
        api.llama_batch_free(batch)


class _Watch:
    """A callback that llama.cpp calls before and after each operation, to sum up squared inputs.

    Exceptions of the callback are stored until `check` raises the first one.
    """

    def __init__(self) -> None:
        self.matrix: dict[str, Importance] = {}
        self._ggml = library()
        self._error: Exception | None = None

    def __call__(self, pointer: int, asks: bool, _: Any) -> bool:
        try:
            tensor = Tensor.from_address(pointer)
            if asks:
                return self._is_wanted(tensor, pointer)
            self._add(tensor.src[0].contents, tensor.src[1].contents)
        except Exception as error:  # an exception cannot propagate through llama.cpp
            self._error = self._error or error
        return True

    def check(self) -> None:
        """Raise the first exception that the callback has stored, if any."""
        if self._error:
            raise self._error

    def _is_wanted(self, tensor: Tensor, pointer: int) -> bool:
        if self._ggml.ggml_get_name(pointer) != tensor.name:
            raise ToolError(
                "this version of llama-cpp-python has another tensor layout than the one that "
                "tuneline supports: install the locked version, or set "
                "quantize.num_importance_rows to 0"
            )
        operation = self._ggml.ggml_op_name(tensor.op)
        if operation == b"MUL_MAT_ID":
            raise ModelError(
                "the model is a mixture of experts, for which importance matrices are not "
                "supported: set quantize.num_importance_rows to 0"
            )
        if operation != b"MUL_MAT":
            return False
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        return bool(weight.name.startswith(b"blk.") and inputs.type == F32)

    def _add(self, weight: Tensor, inputs: Tensor) -> None:
        num_inputs = inputs.ne[0]
        num_tokens = inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        # The inputs must be contiguous, i.e. one token's inputs follow another's without gaps.
        assert inputs.nb[0] == 4 and inputs.nb[1] == 4 * num_inputs
        values = ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float))
        x_TI = numpy.ctypeslib.as_array(values, (num_tokens, num_inputs))
        sums = numpy.einsum("ti,ti->i", x_TI, x_TI, dtype=numpy.float64)
        if not numpy.isfinite(sums).all():
            raise ToolError(
                f"an input of {weight.name.decode()} is not finite in f16: set "
                "quantize.num_importance_rows to 0, or train with a lower train.learning_rate"
            )
        entry = self.matrix.setdefault(
            weight.name.decode(), Importance(numpy.zeros(num_inputs), count=0)
        )
        entry.sums += sums
        entry.count += num_tokens
