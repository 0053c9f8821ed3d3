"""From a base model and an adapter to a merged model with its proof."""

import logging
import time
from pathlib import Path

from tuneline.artifacts import (
    DatasetManifest,
    MergeProof,
    ModelOrigin,
    TrainingSummary,
    new_directory,
)
from tuneline.errors import ModelError, RecipeError
from tuneline.merge.config import MergeConfig

logger = logging.getLogger(__name__)


def run(
    config: MergeConfig,
    *,
    base_model_dir: str | Path,
    adapter_dir: str | Path,
    dataset_dir: str | Path,
    merged_dir: str | Path,
) -> MergeProof:
    """Merge an adapter into its base, one tensor at a time, and prove the result.

    Args:
        config: the recipe's part.
        base_model_dir: what fetch made.
        adapter_dir: what train made, on that base.
        dataset_dir: what prepare made; its held-out rows are the proof's prompts.
        merged_dir: new; gets a model directory and merge.json.

    Raises:
        ModelError: the adapter belongs to another base, or is of a kind that is not merged.
        RecipeError: it was made for the dequantised weights, and the config asks for others.
        WorldError: a file of theirs is not the one that its step left.
        ProofError: the merged model is further from the trained one than the recipe allows.
        OutputExistsError: `merged_dir` has something in it.
    """
    began = time.monotonic()
    base_dir, adapter_dir = Path(base_model_dir), Path(adapter_dir)
    origin = ModelOrigin.read(base_dir)
    training = TrainingSummary.read(adapter_dir)
    dataset = DatasetManifest.read(dataset_dir)
    if training.base_sha256 != origin.sha256:
        raise ModelError(
            f"the adapter was trained on a base with sha256 {training.base_sha256[:12]}, and "
            f"{base_dir} ({origin.source}) has {origin.sha256[:12]}: give the base it was "
            "trained on"
        )
    bases = _bases(config, training)
    origin.check_files(base_dir)
    training.check_files(adapter_dir)
    with new_directory(merged_dir) as directory:
        import torch
        from transformers import AutoTokenizer

        from tuneline.merge import proof
        from tuneline.merge.adapter import Adapter
        from tuneline.merge.weights import (
            check_adapter,
            check_tokenizer,
            copy_companions,
            merge_weights,
            stop_at_end_of_turn,
            write_config,
        )
        from tuneline.models.heldout_rows import read_rows

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
        # Each base with the adapter beside it is what the merged model is held against: that on
        # the original weights it is not what training saw is for the loss to say.
        losses: dict[str, float] = {}
        trained, base = None, ""
        logits: list[torch.Tensor] = []
        for name in bases:
            found: list[torch.Tensor] = []
            answers = proof.ask_trained(
                rows,
                found.append,
                num_greedy_tokens=config.num_greedy_tokens,
                base_model_dir=base_dir,
                adapter_dir=adapter_dir,
                dtype=dtype,
                quantized=training.base_quantization == "nf4" and name == "dequantized",
                device=device,
            )
            losses[name] = answers.loss
            if trained is None or answers.loss < trained.loss:
                trained, base, logits = answers, name, found
        assert trained is not None
        _say(config, training, base, losses)
        num_shards = merge_weights(
            base=base,  # type: ignore[arg-type]
            dtype=getattr(torch, config.dtype),
            max_shard_bytes=config.max_shard_bytes,
            base_model_dir=base_dir,
            adapter=adapter,
            training=training,
            directory=directory,
            device=device,
        )
        num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        logger.info("merged into %d files, %.2f GB; now the proof", num_shards, num_bytes / 1e9)
        comparison = proof.Comparison(logits)
        merged = proof.ask_merged(
            rows,
            comparison.add,
            num_greedy_tokens=config.num_greedy_tokens,
            merged_dir=directory,
            dtype=dtype,
            device=device,
        )
        distance = comparison.distance()
        gap = proof.greedy_gap(trained, merged)
        proof.hold(distance, gap, config, num_rows=len(rows))
        # After the proof, whose two answers go on to the same tokens.
        stop_at_end_of_turn(directory, dataset.end_of_turn, tokenizer)
        record = MergeProof(
            base=base,
            base_asked=config.base,
            base_losses=losses,
            merged_loss=merged.loss,
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
    return record


def _bases(config: MergeConfig, training: TrainingSummary) -> list[str]:
    """Name the bases to measure; the first one is taken where two are equal."""
    if _starts_from_loss(training):
        if config.base == "original":
            raise RecipeError(
                "merge.base is original, and the adapter was made with lora.init_lora_weights "
                "loftq: what 4 bits lose of each weight is in it already, and would be added to "
                "weights that lost nothing; take dequantized or auto"
            )
        return ["dequantized"]
    if config.base != "auto":
        return [config.base]
    if training.base_quantization != "nf4":
        return ["original"]
    return ["dequantized", "original"]


def _starts_from_loss(training: TrainingSummary) -> bool:
    """Tell whether the adapter started from what 4 bits lose, as LoftQ's does."""
    return training.settings.get("lora", {}).get("init_lora_weights") == "loftq"


def _say(
    config: MergeConfig, training: TrainingSummary, base: str, losses: dict[str, float]
) -> None:
    if len(losses) > 1:
        measured = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        logger.info("merge.base auto: %s is taken; held-out loss: %s", base, measured)
    elif config.base == "auto" and _starts_from_loss(training):
        logger.info("merge.base auto: a LoftQ adapter belongs on the dequantized weights alone")
    elif config.base == "auto":
        logger.info("merge.base auto: training saw the original weights, so there is no other base")
    elif base == "original" and training.base_quantization == "nf4":
        logger.warning(
            "merge.base is original: the adapter was trained on the NF4 weights, so the merged "
            "model is not the one whose evaluation loss training reported (auto measures both)"
        )
