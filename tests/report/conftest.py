"""Hand-written records of one run, as every step would leave them."""

from pathlib import Path

import pytest
from small_records import new_comparison

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    LengthStatistics,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    Scores,
    TaskScore,
    TrainingPoint,
    TrainingSummary,
    write_jsonl,
)
from tuneline.recipe import Recipe
from tuneline.train.config import TrainConfig

BASE_HASH = "5f0c" * 16
DATA_HASH = "a91e" * 16

QUESTIONS = [
    ("What is 1500m CPU in cores?", "1.5", "The CPU is 1500m.", "1.5"),
    ("Convert 2Gi to bytes.", "2147483648", "2Gi is 2 gigabytes, which is", "2147483648"),
    ("Is 250m more than 0.3?", "no", "Yes, 250m is more than 0.3 <b>bold</b>", "no"),
    ("Write 3 cores in millicores.", "3000m", "3 cores = 3 millicores", "3000m"),
    ("Convert 512Ki to bytes.", "524288", "512 * 1000 = 512000", "524,288"),
]


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.parse(
        {
            "name": "demo",
            "description": "Teach SmolLM2 Kubernetes quantities.",
            "base_model": "builtin:smollm2-135m",
            "dataset": "builtin:kubernetes-quantities",
            "publish_to": "dir:published",
        }
    )


@pytest.fixture
def run_dirs(tmp_path: Path) -> dict:
    """Write the artifacts; returns the keyword arguments of report.run."""

    def made(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        return path

    base = made("base_model")
    ModelOrigin(
        source="builtin:smollm2-135m",
        licence="apache-2.0",
        architecture="LlamaForCausalLM",
        num_parameters=134_515_008,
        num_bytes=269_060_552,
        sha256=BASE_HASH,
        seconds=11.4,
    ).write(base)
    dataset = made("dataset")
    counts = [3, 40, 210, 420, 310, 120, 28, 9]
    DatasetManifest(
        source="builtin:kubernetes-quantities",
        method="sft",
        format="messages",
        template="tokenizer",
        loss_on="answers",
        num_train_rows=1140,
        num_eval_rows=60,
        num_heldout_rows=200,
        num_rejected_rows=3,
        num_leaking_rows=2,
        contamination={"boolq": {"num_questions": 40, "num_checked": 40, "num_found": 4}},
        num_tokens=61_234,
        num_loss_tokens=9_876,
        lengths=LengthStatistics(
            mean=53.7,
            median=53.0,
            p95=66.0,
            p99=72.0,
            max=79,
            histogram=[(24 + 7 * i, 31 + 7 * i, n) for i, n in enumerate(counts)],
        ),
        max_seq_length=256,
        recommended_max_seq_length=80,
        truncated_token_share=0.0,
        licence="apache-2.0",
        sha256=DATA_HASH,
        seconds=4.2,
    ).write(dataset)
    adapter = made("adapter")
    history = [TrainingPoint(step=0, eval_loss=2.412)]
    for step in range(1, 61):
        history.append(
            TrainingPoint(
                step=step,
                loss=0.21 + 2.3 * 0.92**step + 0.05 * ((step * 7) % 5 - 2),
                eval_loss=0.25 + 2.2 * 0.92**step if step % 12 == 0 else None,
                learning_rate=2e-4 * (1 - step / 60),
            )
        )
    TrainingSummary(
        method="sft",
        num_steps=60,
        num_tokens=122_880,
        final_loss=0.2345,
        eval_gap=0.0321,
        first_eval_loss=2.412,
        final_eval_loss=0.2648,
        num_trainable_parameters=4_884_480,
        num_parameters=139_399_488,
        base_quantization="nf4",
        compute_dtype="bfloat16",
        device="cpu (2 threads)",
        tokens_per_second=743.2,
        peak_memory_bytes=1_934_000_000,
        history=history,
        base_sha256=BASE_HASH,
        dataset_sha256=DATA_HASH,
        device_hours=0.05,
        energy_kwh=0.0123,
        cost=0.175,
        seconds=181.7,
    ).write(adapter, TrainConfig())
    merged = made("merged")
    MergeProof(
        base="dequantized",
        dtype="bfloat16",
        num_bytes=269_060_552,
        num_shards=1,
        num_merged_modules=210,
        num_prompts=8,
        max_logit_difference=0.1875,
        mean_kl=0.00031,
        top1_agreement=0.997,
        max_mean_kl=0.01,
        seconds=14.9,
    ).write(merged)
    exports = []
    for name, num_bytes, bits, types, (kl, top1, perplexity, speed) in [
        ("f16", 270_885_000, 16.0, {"F16": 211, "F32": 61}, (3.4e-6, 1.0, 1.412, 45.2)),
        ("q8_0", 144_811_000, 8.5, {"Q8_0": 211, "F32": 61}, (0.0069, 0.977, 1.415, 66.1)),
        (
            *("q5_k_m", 112_054_000, 6.61, {"Q5_1": 180, "Q8_0": 31, "F32": 61}),
            (0.096, 0.864, 1.533, 70.3),
        ),
        (
            *("q4_k_m", 105_454_000, 6.17, {"Q5_0": 180, "Q8_0": 31, "F32": 61}),
            (0.068, 0.919, 1.491, 75.9),
        ),
    ]:
        path = made(name)
        QuantizedModel(
            format=name,
            kind="gguf",
            file=f"demo-{name}.gguf",
            num_bytes=num_bytes,
            bits_per_weight=bits,
            tensor_types=types,
            notes=["180 of 272 tensors fell back to other types"] if "k_m" in name else [],
            prompt="What is 1500m CPU in cores?",
            generated="1.5" if name != "q4_k_m" else "1.50 cores",
            reference="1.5",
            mean_kl=kl,
            top1_agreement=top1,
            perplexity=perplexity,
            reference_perplexity=1.411,
            num_prompts=8,
            tokens_per_second=speed,
            num_threads=1,
            seconds=3.1,
        ).write(path)
        exports.append(str(path))
    path = made("gptq-4bit")
    QuantizedModel(
        format="gptq-4bit",
        kind="gptq",
        file=".",
        num_bytes=131_000_000,
        bits_per_weight=4.28,
        group_size=64,
        notes=["group_size 128 does not divide 576, took 64"],
        prompt="What is 1500m CPU in cores?",
        generated="1.5",
        seconds=58.0,
    ).write(path)
    exports.append(str(path))
    scores = {}
    for index, label in enumerate(("base", "tuned")):
        scores[label] = made(f"{label}_scores")
        Scores(
            model=label,
            tasks={
                "heldout_choice": TaskScore(
                    metric="acc", higher_is_better=True, value=(0.31, 0.87)[index], num_samples=200
                ),
            },
            harness="lm-eval 0.4.13",
            seconds=(21.3, 22.9)[index],
        ).write(scores[label])
        write_jsonl(
            scores[label] / "generations.jsonl",
            [
                {
                    "question": question,
                    "prompt": f"<|im_start|>user\n{question}",
                    "answer": answer,
                    "text": pair[index],
                }
                for question, answer, *pair in QUESTIONS
            ],
        )
    decision = made("decision")
    Decision(
        verdict="promote",
        reason="heldout_choice got better by 0.56 (95 % interval 0.485 to 0.63), and no other "
        "task got worse.",
        comparisons=[
            new_comparison(
                base=0.31, tuned=0.87, difference=0.56, interval=(0.485, 0.63), lower=0.485
            ),
            new_comparison(
                task="heldout_exact",
                base=0.02,
                tuned=0.0,
                difference=-0.02,
                interval=(-0.045, 0.01),
                lower=-0.045,
                outcome="undecided",
                role="guard",
            ),
            new_comparison(
                task="heldout_perplexity",
                metric="perplexity",
                higher_is_better=False,
                base=9.81,
                tuned=1.34,
                difference=8.47,
                interval=(7.9, 9.1),
                lower=7.9,
                role="guard",
            ),
        ],
        seconds=0.4,
    ).write(decision)
    return {
        "base_model_dir": str(base),
        "dataset_dir": str(dataset),
        "adapter_dir": str(adapter),
        "merged_dir": str(merged),
        "base_scores_dir": str(scores["base"]),
        "tuned_scores_dir": str(scores["tuned"]),
        "decision_dir": str(decision),
        "page_path": str(tmp_path / "report" / "page"),
        "summary_dir": str(tmp_path / "report" / "summary"),
        "exports_dirs": exports,
    }
