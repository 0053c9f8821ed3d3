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
from tuneline.errors import ModelError, ProofError
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
        ProofError: the merged model is further from the trained one than `max_mean_kl`.
        OutputExistsError: `merged_dir` has something in it.
    """
    began = time.monotonic()
    base_dir, adapter_dir = Path(base_model_dir), Path(adapter_dir)
    origin = ModelOrigin.read(base_dir)
    training = TrainingSummary.read(adapter_dir)
    DatasetManifest.read(dataset_dir)
    if training.base_sha256 != origin.sha256:
        raise ModelError(
            f"the adapter was trained on a base with sha256 {training.base_sha256[:12]}, and "
            f"{base_dir} ({origin.source}) has {origin.sha256[:12]}: give the base it was "
            "trained on"
        )
    with new_directory(merged_dir) as directory:
        import torch
        from transformers import AutoTokenizer

        from tuneline.merge.adapter import Adapter
        from tuneline.merge.proof import compare, merged_logits, proof_rows, trained_logits
        from tuneline.merge.weights import copy_companions, merge_weights

        device = "cuda" if torch.cuda.is_available() else "cpu"
        adapter = Adapter(adapter_dir)
        num_shards = merge_weights(
            config,
            base_model_dir=base_dir,
            adapter=adapter,
            training=training,
            directory=directory,
            device=device,
        )
        copy_companions(base_model_dir=base_dir, adapter_dir=adapter_dir, directory=directory)
        num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        logger.info("merged into %d files, %.2f GB; now the proof", num_shards, num_bytes / 1e9)

        # On the original weights the adapter is held against what it is there: base plus
        # adapter unquantised. That this is not what training saw is said.
        in_4bit = training.base_quantization == "nf4"
        if in_4bit and config.base == "original":
            logger.warning(
                "merge.base is original: the adapter was trained on the NF4 weights, so the "
                "merged model is not the one whose evaluation loss training reported"
            )
        rows = proof_rows(
            Path(dataset_dir),
            AutoTokenizer.from_pretrained(str(directory)),
            config.num_proof_prompts,
        )
        dtype = getattr(torch, training.compute_dtype)
        distance = compare(
            trained_logits(
                rows,
                base_model_dir=base_dir,
                adapter_dir=adapter_dir,
                dtype=dtype,
                quantized=in_4bit and config.base == "dequantized",
                device=device,
            ),
            merged_logits(rows, merged_dir=directory, dtype=dtype, device=device),
        )
        if not distance.mean_kl <= config.max_mean_kl:
            raise ProofError(
                f"the merged model is {distance.mean_kl:.4g} nats a token (mean KL over "
                f"{len(rows)} prompts) from base plus adapter, and merge.max_mean_kl allows "
                f"{config.max_mean_kl:g}: merge with dtype float32 or base dequantized, or raise "
                "the bound if you accept it"
            )
        proof = MergeProof(
            base=config.base,
            dtype=config.dtype,
            num_bytes=num_bytes,
            num_shards=num_shards,
            num_merged_modules=len(adapter.modules),
            num_prompts=len(rows),
            max_logit_difference=distance.max_logit_difference,
            mean_kl=distance.mean_kl,
            top1_agreement=distance.top1_agreement,
            max_mean_kl=config.max_mean_kl,
            seconds=time.monotonic() - began,
        )
        proof.write(directory)
    logger.info("proof: mean KL %.3g, top-1 %.4f", distance.mean_kl, distance.top1_agreement)
    return proof
