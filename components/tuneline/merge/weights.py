"""Write the merged weights, and the files that belong to them."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tuneline.artifacts import RECORD_FILES
from tuneline.errors import ModelError, ProofError
from tuneline.merge.adapter import Adapter
from tuneline.merge.exact import check_piece
from tuneline.merge.pieces import Names, Pieces
from tuneline.models import rope
from tuneline.models.checkpoint import Checkpoint, Spec
from tuneline.models.sharded_files import write_sharded
from tuneline.models.stored_quantisation import in_dtype
from tuneline.models.tokenizer import files as tokenizer_files
from tuneline.record import sha256_of_file

logger = logging.getLogger(__name__)


def check_adapter(adapter: Adapter, base_model_dir: Path) -> None:
    """Check, by names alone, that every weight of an adapter has a counterpart in the base model.

    Raises:
        ModelError: an adapter weight has no counterpart, or its counterpart is tied to another
            weight.
    """
    names = Names(Checkpoint(base_model_dir), adapter, base_model_dir)
    _check_tied(adapter, names.model)


def merge_weights(
    pieces: Pieces, *, dtype: torch.dtype, max_shard_bytes: int, directory: Path
) -> int:
    """Write the merged weights into `directory`, check each of them; return the number of files.

    Every sum is computed in fp32 and rounded once, to `dtype`, and compared with a second sum,
    which `exact` computes in fp64. The files are hashed as they are written and once more as they
    are read again.

    Args:
        pieces: the merged weights.
        dtype: dtype of the merged weights.
        max_shard_bytes: largest size of a weight file.
        directory: directory to write the files to.

    Raises:
        ProofError: a written tensor is not what it has to be.
    """

    def make(name: str) -> Iterator[torch.Tensor]:
        for piece in pieces(name):
            weight = piece.merged()
            weight = weight.to(dtype) if weight.is_floating_point() else weight
            check_piece(name, weight, piece)
            yield weight

    checkpoint, names = pieces.checkpoint, pieces.names
    specs = {
        name: Spec(dtype, spec.shape) if spec.dtype.is_floating_point else spec
        for name, spec in checkpoint.specs.items()
    }
    logger.info(
        "adding to %d linear layers and %d stacks of experts, of %d tensors; %d are from 4 bits%s",
        len(names.linears),
        len(names.updated_stacks),
        len(specs),
        len(pieces.in_4bit | checkpoint.packed),
        ", as the base model's files hold them" if checkpoint.packed else "",
    )
    written = write_sharded(directory, specs, make, max_shard_bytes=max_shard_bytes)
    for file, sha256 in written.items():
        if sha256_of_file(directory / file) != sha256:
            raise ProofError(
                f"{directory / file} was damaged as it was written: its SHA-256 is not that of the "
                "merged weights. Check the disk, and run merge again"
            )
    return len(written)


def write_config(*, base_model_dir: Path, dtype: str, directory: Path) -> None:
    """Write the base model's config.json with the merged model's dtype, and nothing quantised."""
    settings = json.loads((base_model_dir / "config.json").read_text(encoding="utf-8"))
    settings = rope.with_old_names(in_dtype(settings, dtype))
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


_WEIGHTS = (".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".index.json")
"""Endings of weight files in formats other than safetensors, and of index files (not copied)."""


def copy_companions(*, base_model_dir: Path, adapter_dir: Path, directory: Path) -> None:
    """Copy the files that a model directory has in addition to config.json and the weights.

    generation_config.json, licence and tokenizer come from the base model. The chat template comes
    from the adapter, because training may have used another template than the base model's.
    """
    # Not copied here: config.json (see `write_config`), .gitattributes of the base model's
    # repository, records of a base model that tuneline made, and the tokenizer (copied below).
    left_out = {"config.json", ".gitattributes", *RECORD_FILES, *tokenizer_files.NAMES}
    for path in sorted(base_model_dir.iterdir()):
        is_weight = path.name.endswith(_WEIGHTS) or ".safetensors" in path.name
        if path.is_file() and not is_weight and path.name not in left_out:
            shutil.copyfile(path, directory / path.name)
    tokenizer_files.copy_tokenizer(base_model_dir, directory)
    template = tokenizer_files.read_chat_template(adapter_dir)
    if template is not None:
        tokenizer_files.set_chat_template(directory, template)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, adapter_dir: Path) -> None:
    """Check that base model and adapter have the same vocabulary, with an embedding per token.

    Raises:
        ModelError: training used another vocabulary, or the model has no embedding for a token.
    """
    ours = tokenizer.get_vocab()
    if any((adapter_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        theirs = AutoTokenizer.from_pretrained(str(adapter_dir)).get_vocab()
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()))
            raise ModelError(
                f"the tokenizer in {adapter_dir} has {len(theirs)} tokens, the base model's has "
                f"{len(ours)}, and {len(odd)} differ, first {odd[0][0]!r}: the adapter was trained "
                "with another tokenizer; use the base model that it was trained on"
            )
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    size = (settings.get("text_config") or settings).get("vocab_size")
    beyond = sorted(token for token, index in ours.items() if size is not None and index >= size)
    # Added tokens may lack an embedding: Gemma-3 1B has a token for images, but only a text model.
    # Any: PreTrainedTokenizerBase does not declare get_added_vocab, but both its subclasses do.
    strange = [token for token in beyond if token not in cast(Any, tokenizer).get_added_vocab()]
    if strange:
        raise ModelError(
            f"the base model's tokenizer has {len(strange)} tokens, first {strange[0]!r}, with IDs "
            f"from {size} on, for which the model has no embedding, so the tokenizer files belong "
            "to another model: fetch the base model again"
        )
    if beyond:
        logger.warning("the model has no embedding for the tokens %s: do not use them", beyond)


def _check_tied(adapter: Adapter, model: Any) -> None:
    """Refuse embeddings trained in full if input and output embeddings share one matrix."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    for name in adapter.replaced:
        module = name.rpartition(".")[0]
        if tied and model.get_submodule(module) in ends:
            raise ModelError(
                f"the adapter retrained {module}, but this model's input and output embeddings "
                "share one matrix: train without it in modules_to_save"
            )
