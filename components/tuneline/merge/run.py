"""Merge an adapter into its base model, and prove the merged model."""

import logging
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tuneline.artifacts import (
    DatasetManifest,
    MergeProof,
    ModelOrigin,
    TrainingSummary,
    new_directory,
)
from tuneline.errors import ModelError, RecipeError
from tuneline.merge import proof
from tuneline.merge.adapter import Adapter
from tuneline.merge.config import MergeConfig
from tuneline.merge.evaluation import read_evaluation_rows
from tuneline.merge.pieces import Base, Pieces
from tuneline.merge.weights import (
    check_adapter,
    check_tokenizer,
    copy_companions,
    merge_weights,
    write_config,
)
from tuneline.models.heldout_rows import read_rows
from tuneline.models.sampling import set_sampling, stop_at_end_of_turn
from tuneline.models.stored_quantisation import stored_type

logger = logging.getLogger(__name__)


def run(
    config: MergeConfig,
    *,
    base_model_dir: str | Path,
    adapter_dir: str | Path,
    dataset_dir: str | Path,
    merged_dir: str | Path,
) -> MergeProof:
    """Merge an adapter into its base model, one tensor at a time, and prove the result.

    Args:
        config: the `merge` section of the recipe.
        base_model_dir: directory that fetch made.
        adapter_dir: directory that train made, from the base model in `base_model_dir`.
        dataset_dir: directory that prepare made; its held-out rows are the proof's prompts.
        merged_dir: directory to create for the merged model and merge.json.

    Raises:
        ModelError: the adapter belongs to another base model, or its kind is not supported.
        RecipeError: the adapter must be added to the dequantised weights, but the config asks for
            the original ones.
        WorldError: an input file has changed since the step that made it recorded its hash.
        ProofError: the merged model's predictions differ from those of the base model with the
            adapter by more than the recipe allows.
        OutputExistsError: `merged_dir` is not empty.
    """
    began = time.monotonic()
    base_dir, adapter_dir = Path(base_model_dir), Path(adapter_dir)
    origin = ModelOrigin.read(base_dir)
    training = TrainingSummary.read(adapter_dir)
    dataset = DatasetManifest.read(dataset_dir)
    if training.base_sha256 != origin.sha256:
        raise ModelError(
            f"the adapter was trained on a base model with sha256 {training.base_sha256[:12]}, "
            f"but {base_dir} ({origin.source}) has {origin.sha256[:12]}: use the base model that "
            "it was trained on"
        )
    bases = _bases(config, training, is_stored_in_4bit=stored_type(base_dir) is not None)
    origin.check_files(base_dir)
    training.check_files(adapter_dir)
    with new_directory(merged_dir) as directory:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, training.compute_dtype)
        adapter = Adapter(adapter_dir)
        check_adapter(adapter, base_dir)
        copy_companions(base_model_dir=base_dir, adapter_dir=adapter_dir, directory=directory)
        write_config(base_model_dir=base_dir, dtype=config.dtype, directory=directory)
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        check_tokenizer(tokenizer, directory, adapter_dir)
        rows = read_rows(
            Path(dataset_dir),
            config.num_proof_prompts,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        )
        # The proof compares the merged model with the adapter on the base that was chosen. It
        # cannot show whether an adapter that was trained on NF4 weights suits the original weights;
        # the loss on the rows shows that, so the base with the lower loss is chosen.
        losses: dict[str, float] = {}
        trained, base = None, bases[0]
        logits: list[torch.Tensor] = []
        tuning_kl = 0.0
        for name in bases:
            row_logits: list[torch.Tensor] = []
            tuning = proof.Comparison(row_logits)
            answers = proof.ask_trained(
                rows,
                row_logits.append,
                base_sink=tuning.add,
                num_greedy_tokens=config.num_greedy_tokens,
                base_model_dir=base_dir,
                adapter_dir=adapter_dir,
                dtype=dtype,
                quantized=training.base_quantization != "none" and name == "dequantized",
                device=device,
            )
            losses[name] = answers.loss
            if trained is None or answers.loss < trained.loss:
                trained, base, logits = answers, name, row_logits
                tuning_kl = tuning.distance().mean_kl
        assert trained is not None
        _log_choice(config, training, base, losses)
        num_shards = merge_weights(
            Pieces(base_dir, adapter, training, base=base, device=device),
            dtype=getattr(torch, config.dtype),
            max_shard_bytes=config.max_shard_bytes,
            directory=directory,
        )
        num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        logger.info(
            "merged into %d files, %.2f GB; proving the result", num_shards, num_bytes / 1e9
        )
        comparison = proof.Comparison(logits)
        # An adapter that was trained on NF4 weights has another loss on the original ones. How far
        # apart the two are is known only if both were measured.
        is_comparable = (
            base == "dequantized" or training.base_quantization == "none" or len(losses) > 1
        )
        evaluation = (
            read_evaluation_rows(Path(dataset_dir), training, max_seq_length=dataset.max_seq_length)
            if is_comparable
            else None
        )
        merged = proof.ask_merged(
            rows,
            comparison.add,
            num_greedy_tokens=config.num_greedy_tokens,
            evaluation=evaluation,
            merged_dir=directory,
            dtype=dtype,
            device=device,
        )
        distance = comparison.distance()
        gap = proof.greedy_gap(trained, merged)
        proof.check_bounds(distance, gap, config, num_rows=len(rows))
        # Done after the proof, because it adds a token at which the merged model stops.
        set_sampling(directory, config.sampling)
        stop_at_end_of_turn(directory, dataset.end_of_turn, tokenizer)
        record = MergeProof(
            base=base,
            base_asked=config.base,
            base_losses=losses,
            merged_loss=merged.loss,
            eval_loss=merged.eval_loss,
            trained_eval_loss=training.final_eval_loss if evaluation else None,
            num_eval_tokens=evaluation.num_targets if evaluation else 0,
            tuning_kl=tuning_kl,
            dtype=config.dtype,
            num_bytes=num_bytes,
            num_shards=num_shards,
            num_merged_modules=len(adapter.modules),
            num_prompts=len(rows),
            max_logit_difference=distance.max_logit_difference,
            mean_kl=distance.mean_kl,
            top1_agreement=distance.top1_agreement,
            max_mean_kl=config.max_mean_kl,
            min_top1_agreement=config.min_top1_agreement,
            trained_answer=tokenizer.decode(trained.greedy_ids, skip_special_tokens=True),
            merged_answer=tokenizer.decode(merged.greedy_ids, skip_special_tokens=True),
            seconds=time.monotonic() - began,
        )
        record.write(directory, config, parents=(origin, dataset, training))
    logger.info("proof: mean KL %.3g, top-1 %.4f", distance.mean_kl, distance.top1_agreement)
    if remark := record.unexplained_loss():
        logger.warning("%s", remark)
    return record


def _bases(
    config: MergeConfig, training: TrainingSummary, *, is_stored_in_4bit: bool
) -> list[Base]:
    """Return the bases to merge into and measure, the preferred one first.

    Raises:
        RecipeError: the adapter must be added to the dequantised weights, but the config asks for
            the original ones.
    """
    if is_stored_in_4bit:
        if config.base == "original":
            raise RecipeError(
                "merge.base is original, but the base model's files hold its weights in 4 bits "
                "alone: set merge.base to dequantized, or take as base_model the model in 16 bits "
                "that it was made from"
            )
        return ["dequantized"]
    if _is_loftq(training):
        if config.base == "original":
            raise RecipeError(
                "merge.base is original, but the adapter was trained with lora.init_lora_weights "
                "loftq: it already contains the quantisation error of the 4-bit weights, which "
                "the original weights do not have; take dequantized or auto"
            )
        return ["dequantized"]
    if config.base != "auto":
        return [config.base]
    if training.base_quantization == "none":
        return ["original"]
    return ["dequantized", "original"]


def _is_loftq(training: TrainingSummary) -> bool:
    """Return whether LoftQ initialised the adapter, to compensate for the quantisation error."""
    return bool(training.settings.get("lora", {}).get("init_lora_weights") == "loftq")


def _log_choice(
    config: MergeConfig, training: TrainingSummary, base: str, losses: dict[str, float]
) -> None:
    """Log which base was chosen and why; warn if the recipe chose one that training did not see."""
    if len(losses) > 1:
        measured = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        logger.info("merge.base auto: %s is taken; held-out loss: %s", base, measured)
    elif config.base == "auto" and _is_loftq(training):
        logger.info("merge.base auto: a LoftQ adapter belongs on the dequantized weights alone")
    elif config.base == "auto" and base == "dequantized":
        logger.info("merge.base auto: the base model's files hold its weights in 4 bits alone")
    elif config.base == "auto":
        logger.info("merge.base auto: training saw the original weights, so there is no other base")
    elif base == "original" and training.base_quantization != "none":
        logger.warning(
            "merge.base is original, but the adapter was trained on the NF4 weights, so the merged "
            "model is not the one whose evaluation loss training reported (auto measures both)"
        )
