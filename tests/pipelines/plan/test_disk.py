"""plan: the disk space of the pods, and files that KFP cannot upload."""

import pytest
from plan_cases import LLAMA, recipe

from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.plan.disk import POD_BYTES, pod_disks
from tuneline.pipelines.plan.estimate import estimate
from tuneline.pipelines.plan.plan import plan
from tuneline.quantize.formats import FORMATS
from tuneline.steps import STEPS


def test_disk_counts_base_merged_and_exports() -> None:
    loaded = recipe('quantize.gguf=["f16", "q8_0"]', "quantize.gptq=[]")
    found = estimate(loaded, LLAMA)
    # 16 GB each: base, merged, f16 to convert from and the f16 export; and 8.5 GB.
    assert found.artifact_bytes == pytest.approx(LLAMA * (2 + 2 + 2 + 2 + 1.0625), rel=0.01)


def test_the_disk_of_every_pod() -> None:
    loaded = recipe(
        'quantize.gguf=["f16", "q8_0"]', 'quantize.gptq=["gptq-4bit"]',
        'quantize.awq=["awq"]', 'quantize.fp8=["fp8"]',
        "quantize.num_importance_rows=8", "publish_to=org/model",
    )  # fmt: skip
    found = {pod.step: (pod.num_bytes - POD_BYTES) / LLAMA for pod in pod_disks(loaded, LLAMA)}
    adapter = 4 * 41_943_040 / LLAMA
    gptq, awq, fp8 = (FORMATS[name].bits_per_weight / 8 for name in ("gptq-4bit", "awq", "fp8"))
    assert found == pytest.approx(
        {
            "fetch": 4, "prepare": 2, "check-exports": 2, "evaluate": 2, "train": 2 + adapter,
            "merge": 4 + adapter,
            "convert-gguf": 4, "measure-importance": 2, "quantize-gguf": 6,
            "quantize-gptq": 2 + gptq, "quantize-awq": 2 + awq, "quantize-fp8": 2 + fp8,
            "publish": adapter + 2 + 2 + 1.0625 + gptq + awq + fp8,
        },
        rel=1e-3,
    )  # fmt: skip
    # Every step but these is counted: they read records, scores, questions and parameters only.
    light = {"plan", "gate", "report", "diagnose"}
    light |= {"look-up-model", "look-up-data", "look-up-published"}
    assert set(STEPS) - set(found) == light | {
        "train-on-nodes",
        "receive-files",
        "collect-benchmarks",
    }
    elsewhere = recipe("placement.cache_claim=cache", "publish_to=dir:/models", "quantize.gguf=[]")
    found = {pod.step: (pod.num_bytes - POD_BYTES) / LLAMA for pod in pod_disks(elsewhere, LLAMA)}
    assert found["fetch"] == pytest.approx(2)
    assert found["publish"] == pytest.approx(2 * (adapter + 2 + gptq), rel=1e-3)
    assert "convert-gguf" not in found


def test_the_disk_of_a_pod_that_was_measured() -> None:
    """KFP 2.17: publish of the demo to a directory in its pod used 2.389 GB at most."""
    demo = find_recipe("demo", [])
    (publish,) = [pod for pod in pod_disks(demo, 134_515_008) if pod.step == "publish"]
    assert publish.num_bytes == pytest.approx(2.389e9, rel=0.1)


@pytest.mark.parametrize(
    ("num_parameters", "assignments", "profile", "verdict"),
    [
        (24e9, [], "h100", None),
        (27.2e9, [], "h100", "fail"),
        (27.2e9, [], "local", "warn"),
        (70e9, ["quantize.gguf=[]"], "h100", None),
        (110e9, ["quantize.gguf=[]", "train.lora.r=1024"], "h100", "fail"),
    ],
)
def test_a_file_that_kfp_cannot_upload_is_refused(
    num_parameters: float, assignments: list[str], profile: str, verdict: str | None
) -> None:
    loaded = recipe(*assignments, profile=profile)
    checks = plan(loaded, num_parameters=num_parameters)
    found = [check for check in checks if check.name == "file size"]
    assert [check.verdict for check in found] == ([verdict] if verdict else [])
    if verdict and not assignments:
        assert found[0].words.startswith("convert-gguf writes one file of 54.4 GB (f16, from")
        assert "at most 52.4 GB per file" in found[0].words
        assert "quantize.gguf to []" in found[0].advice and "26.2 B" in found[0].advice
    # Google Cloud Storage takes such a file.
    checks = plan(loaded, num_parameters=num_parameters, uploads_to_s3=False)
    assert "file size" not in {check.name for check in checks}
