"""Try a conversion to GGUF on the base model, before training."""

import json
import logging
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from tuneline.artifacts import CHAT_TEMPLATE_FILE, DatasetManifest
from tuneline.errors import ModelError, ProofError, ToolError
from tuneline.models import sampling
from tuneline.models.stored_quantisation import stored_type, without_quantization
from tuneline.models.tokenizer import files as tokenizer_files
from tuneline.quantize.gguf import converter
from tuneline.quantize.gguf.llama_model import LlamaFile
from tuneline.quantize.gguf.proof import check_wording
from tuneline.quantize.proof.reference import Wording, prompts_of
from tuneline.runtime.scratch import scratch_directory

logger = logging.getLogger(__name__)


def check(base_dir: Path, dataset_dir: Path) -> None:
    """Check that llama.cpp converts the base model, and tokenises, renders and stops as it does.

    Args:
        base_dir: directory that fetch made.
        dataset_dir: directory that prepare made.

    Raises:
        ModelError: a GGUF file of the merged model would fail; the message says why.
        ToolError: llama.cpp is not installed.
    """
    converter.find()  # Raises its own error, outside the `try` below.
    with scratch_directory() as scratch:
        outline = scratch / "model"
        outline.mkdir()
        wording = _outline(base_dir, dataset_dir, outline)
        file = scratch / "vocabulary.gguf"
        try:
            converter.convert(
                outline,
                file,
                end_of_turn=wording.further_end(),
                adds_bos=wording.adds_bos(),
                writes="vocabulary",
            )
            with LlamaFile(file, num_context=16, vocab_only=True) as loaded:
                num_texts, num_conversations, notes = check_wording(loaded, wording)
            if stored_type(base_dir) is None:
                # Tensors of a base in 4 bits have other names and shapes than the merged model's.
                converter.convert(outline, file, writes="nothing")
        except (ToolError, ProofError) as error:
            raise ModelError(
                f"a GGUF file of this base model would fail after training: {error}. This was "
                "found on the base model itself, so training does not change it: set "
                "quantize.gguf to [], or take another base model or chat template"
            ) from error
    logger.info(
        "llama.cpp converts this model: %d texts are split alike, %d conversations are rendered "
        "alike%s",
        num_texts,
        num_conversations,
        "".join(f"; {note}" for note in notes),
    )


def _outline(base_dir: Path, dataset_dir: Path, outline: Path) -> Wording:
    """Write a directory as merge will, with links in place of the weights; return its wording."""
    for path in base_dir.iterdir():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            (outline / path.name).symlink_to(path.resolve())
        elif path.name == sampling.FILE:
            shutil.copyfile(path, outline / path.name)
    settings = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(without_quantization(settings))
    (outline / "config.json").write_text(text, encoding="utf-8")
    tokenizer_files.copy_tokenizer(base_dir, outline)
    template = dataset_dir / CHAT_TEMPLATE_FILE
    if template.is_file():
        tokenizer_files.set_chat_template(outline, template.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(outline)
    dataset = DatasetManifest.read(dataset_dir)
    sampling.stop_at_end_of_turn(outline, dataset.end_of_turn, tokenizer)
    stops = {*sampling.stop_tokens(outline), tokenizer.eos_token_id}
    prompts, end = prompts_of(dataset_dir)
    return Wording(
        model_dir=outline,
        tokenizer=tokenizer,
        stop_ids=sorted(token for token in stops if token is not None),
        prompts=prompts,
        end=end,
    )
