"""Measure which inputs of each weight matter: the importance matrix of llama.cpp's quantisers.

They round a weight by the error that it makes in the output, and for that they want to know how
large the weight's input is: its mean square over the run's own training rows. It is measured as
llama-imatrix does, by watching the matrix products while llama.cpp computes the f16 file, but a
row of the data set is a text of its own; llama-imatrix cuts one long text into pieces. Embeddings
and head are left out, as it leaves them out.
"""

import ctypes
import logging
import time
from pathlib import Path
from typing import Any

from tuneline.artifacts import DatasetManifest, ImportanceMatrix, QuantizedModel, new_directory
from tuneline.errors import ModelError, RecipeError, ToolError
from tuneline.quantize import child_process
from tuneline.quantize.calibration import read_rows
from tuneline.quantize.child_process import STOPPED
from tuneline.quantize.config import QuantizeConfig
from tuneline.quantize.gguf import importance_file
from tuneline.quantize.gguf.ggml import F32, Tensor, library
from tuneline.quantize.gguf.importance_file import Importance
from tuneline.quantize.threads import num_threads
from tuneline.runtime.signals import raised_on_sigterm

logger = logging.getLogger(__name__)

FILE = "importance.gguf"
MAX_ROW_TOKENS = 512
"""Of a row; llama.cpp keeps a batch's logits, at the vocabulary's size for each token."""


@raised_on_sigterm(STOPPED, once=True)
def measure_importance(
    config: QuantizeConfig, *, gguf_dir: str, dataset_dir: str, importance_dir: str
) -> ImportanceMatrix:
    """Measure the importance matrix on the first training rows.

    Args:
        config: the recipe's part; `num_importance_rows` rows are taken.
        gguf_dir: what `convert` made.
        dataset_dir: what prepare made.
        importance_dir: new; gets the file and its record.

    Raises:
        RecipeError: the config asks for no rows.
        DataError: there are no training rows.
        ModelError: the model has several experts.
        ToolError: llama.cpp cannot compute the file.
        WorldError: the file is not the one that `convert` left.
        StoppedError: SIGTERM came; nothing is kept.
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
    """Measure it with a GGUF file that was checked, as `measure_importance` does."""
    started = time.monotonic()
    rows = read_rows(
        dataset_dir,
        config.num_importance_rows,
        setting="num_importance_rows",
        purpose="the importance matrix is measured",
    )
    rows = [row[:MAX_ROW_TOKENS] for row in rows if row]
    f16 = QuantizedModel.read(gguf_dir)
    found = collect(gguf_dir / f16.file, rows)
    dataset = DatasetManifest.read(dataset_dir)
    importance_file.write(target / FILE, found, source=dataset.sha256, num_rows=len(rows))
    record = ImportanceMatrix(
        file=FILE,
        num_rows=len(rows),
        num_tokens=sum(len(row) for row in rows),
        num_tensors=len(found),
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
    """Compute rows of token ids with a GGUF file; return what went into its matrices, by name.

    Raises:
        ModelError: the model has several experts.
        ToolError: llama.cpp cannot compute the file.
    """
    import llama_cpp

    watch = _Watch()
    watching = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(watch)
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    # Repacked weights lose their place in the file.
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
    if not model:
        raise ToolError(f"llama.cpp does not load {file}")
    try:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(len(row) for row in rows)
        params.n_threads = params.n_threads_batch = num_threads()
        params.cb_eval = watching
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise ToolError(f"llama.cpp has no room to compute {file}")
        try:
            for row in rows:
                _compute(llama_cpp, context, row)
                watch.check()
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)
    return watch.found


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
            # All: the last layer computes nothing for tokens without an output.
            batch.logits[index] = True
        if api.llama_decode(context, batch):
            raise ToolError(f"llama.cpp could not compute a row of {len(row)} tokens")
    finally:
        api.llama_batch_free(batch)


class _Watch:
    """What llama.cpp calls before and after each operation; errors wait for `check`."""

    def __init__(self) -> None:
        self.found: dict[str, Importance] = {}
        self._ggml = library()
        self._error: Exception | None = None

    def __call__(self, pointer: int, asks: bool, _: Any) -> bool:
        try:
            tensor = Tensor.from_address(pointer)
            if asks:
                return self._is_wanted(tensor, pointer)
            self._add(tensor.src[0].contents, tensor.src[1].contents)
        except Exception as error:  # it cannot pass through llama.cpp
            self._error = self._error or error
        return True

    def check(self) -> None:
        """Raise what a call found."""
        if self._error:
            raise self._error

    def _is_wanted(self, tensor: Tensor, pointer: int) -> bool:
        if self._ggml.ggml_get_name(pointer) != tensor.name:
            raise ToolError(
                "this llama-cpp-python lays out its tensors otherwise than the version that "
                "tuneline is made for: install the locked one, or set quantize.num_importance_rows "
                "to 0"
            )
        operation = self._ggml.ggml_op_name(tensor.op)
        if operation == b"MUL_MAT_ID":
            raise ModelError(
                "the model has several experts, for which no importance matrix is measured: set "
                "quantize.num_importance_rows to 0"
            )
        if operation != b"MUL_MAT":
            return False
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        return weight.name.startswith(b"blk.") and inputs.type == F32

    def _add(self, weight: Tensor, inputs: Tensor) -> None:
        import numpy

        num_inputs = inputs.ne[0]
        num_tokens = inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        # Rows of a batch follow each other without gaps in everything that a weight multiplies.
        assert inputs.nb[0] == 4 and inputs.nb[1] == 4 * num_inputs
        values = ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float))
        x_TI = numpy.ctypeslib.as_array(values, (num_tokens, num_inputs))
        sums = numpy.einsum("ti,ti->i", x_TI, x_TI, dtype=numpy.float64)
        if not numpy.isfinite(sums).all():
            raise ToolError(f"an input of {weight.name.decode()} is not finite")
        entry = self.found.setdefault(
            weight.name.decode(), Importance(numpy.zeros(num_inputs), count=0)
        )
        entry.sums += sums
        entry.count += num_tokens
