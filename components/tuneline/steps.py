"""The steps of the pipeline: one table with every fact about a step that other modules need.

Each key is the name of a KFP component in some `component.py`. Placement, the resource requests,
the images' self-check and the report's pipeline diagram are derived from this table. Tests check
that the table agrees with the components and with images/README.md.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: its image, its resources, and its place in the report's pipeline diagram."""

    image: str
    """Dependency set of the step's image, a directory in images/."""
    module: str
    """Module that does the step's work; the image's self-check imports it."""
    stage: str | None
    """Stage of the report's pipeline diagram in which the step is shown; None if it is not
    shown."""
    cpu: tuple[str, str]
    """CPU request and limit, as Kubernetes quantities."""
    memory: tuple[str, str]
    """Memory request and limit, as Kubernetes quantities."""
    timeout_hours: float
    """Time limit of the pod, in hours; much longer than the step usually takes."""
    gpu: bool = False
    """Whether the step can use an accelerator. Only train can use more than one."""
    hub: bool = False
    """Whether the step uses the network, and therefore gets the Hub token and the cache volume."""
    tracks: bool = False
    """Whether the step may report to trackers, and therefore gets `placement.secrets`."""
    notifies: bool = False
    """Whether the step tells webhooks, and therefore gets the variables that `notify` names."""
    scratch: bool = True
    """Whether the step loads or writes models, and therefore gets a volume for temporary files."""
    num_retries: int = 0
    """Number of retries by KFP, which follow only if the pod disappeared. A step itself handles
    errors of the network (runtime/retries.py) and faults of ranks (train/restarts.py)."""


STEPS: dict[str, Step] = {
    # No retry: a second attempt finds the same problems, and the Kubernetes client itself retries
    # its requests.
    "plan": Step(
        image="light", module="tuneline.pipelines.plan.run", stage="fetch",
        cpu=("500m", "1"), memory=("512Mi", "1Gi"), timeout_hours=1, scratch=False,
    ),
    "look-up-model": Step(
        image="train", module="tuneline.fetch.fingerprint", stage="fetch",
        cpu=("1", "4"), memory=("1Gi", "4Gi"), timeout_hours=2,
        hub=True, scratch=False, num_retries=3,
    ),
    # Part of a run only if `tuneline submit` sends files with it.
    "receive-files": Step(
        image="light", module="tuneline.prepare.uploads", stage="prepare",
        cpu=("500m", "1"), memory=("512Mi", "1Gi"), timeout_hours=1, scratch=False, num_retries=3,
    ),
    "look-up-data": Step(
        image="train", module="tuneline.prepare.fingerprint", stage="prepare",
        cpu=("1", "4"), memory=("1Gi", "4Gi"), timeout_hours=2,
        hub=True, scratch=False, num_retries=3,
    ),
    # Runs beside the other look-ups, long before the gate, which takes its output.
    "look-up-published": Step(
        image="publish", module="tuneline.publish.earlier", stage="fetch",
        cpu=("500m", "1"), memory=("512Mi", "1Gi"), timeout_hours=1,
        hub=True, scratch=False, num_retries=3,
    ),
    "fetch": Step(
        image="train", module="tuneline.fetch.run", stage="fetch",
        cpu=("1", "4"), memory=("4Gi", "16Gi"), timeout_hours=6, hub=True, num_retries=3,
    ),
    "prepare": Step(
        image="train", module="tuneline.prepare.run", stage="prepare",
        cpu=("2", "8"), memory=("4Gi", "16Gi"), timeout_hours=12, hub=True, num_retries=2,
    ),
    # Needs no GPU, and finds before training what would fail an export after it.
    "check-exports": Step(
        image="gguf", module="tuneline.quantize.early", stage="prepare",
        cpu=("1", "4"), memory=("2Gi", "8Gi"), timeout_hours=2, num_retries=2,
    ),
    "train": Step(
        image="train", module="tuneline.train.run", stage="train",
        cpu=("4", "16"), memory=("16Gi", "64Gi"), timeout_hours=96,
        gpu=True, tracks=True, num_retries=2,
    ),
    # Creates a TrainJob and waits for it; the job may be in a queue for days. The job gets the time
    # limit, GPUs and memory of `train`. A retry finds the job that the first attempt created.
    "train-on-nodes": Step(
        image="light", module="tuneline.train.trainjob.follow", stage="train",
        cpu=("500m", "2"), memory=("1Gi", "4Gi"), timeout_hours=720, scratch=False, num_retries=3,
    ),
    "merge": Step(
        image="train", module="tuneline.merge.run", stage="merge",
        cpu=("4", "16"), memory=("16Gi", "64Gi"), timeout_hours=6, gpu=True, num_retries=1,
    ),
    # For an 8B model, the step allocates up to 6 GiB (plan/host_memory.py); the limit leaves room
    # for the pages of its memory-mapped files too.
    "convert-gguf": Step(
        image="gguf", module="tuneline.quantize.run", stage="quantize",
        cpu=("2", "8"), memory=("8Gi", "48Gi"), timeout_hours=6, num_retries=1,
    ),
    "measure-importance": Step(
        image="gguf", module="tuneline.quantize.gguf.importance", stage="quantize",
        cpu=("2", "16"), memory=("8Gi", "48Gi"), timeout_hours=6, num_retries=1,
    ),
    "quantize-gguf": Step(
        image="gguf", module="tuneline.quantize.run", stage="quantize",
        cpu=("2", "16"), memory=("8Gi", "48Gi"), timeout_hours=6, num_retries=1,
    ),
    "quantize-gptq": Step(
        image="gptq", module="tuneline.quantize.run", stage="quantize",
        cpu=("4", "16"), memory=("16Gi", "64Gi"), timeout_hours=24, gpu=True, num_retries=1,
    ),
    "quantize-awq": Step(
        image="gptq", module="tuneline.quantize.run", stage="quantize",
        cpu=("4", "16"), memory=("16Gi", "64Gi"), timeout_hours=24, gpu=True, num_retries=1,
    ),
    # Calibrates nothing. A GPU only makes the proof faster.
    "quantize-fp8": Step(
        image="gptq", module="tuneline.quantize.run", stage="quantize",
        cpu=("4", "16"), memory=("16Gi", "64Gi"), timeout_hours=6, gpu=True, num_retries=1,
    ),
    # Only in recipes that name tasks of lm-eval; runs before prepare.
    "collect-benchmarks": Step(
        image="evaluate", module="tuneline.evaluate.benchmarks", stage="prepare",
        cpu=("1", "4"), memory=("2Gi", "8Gi"), timeout_hours=4, hub=True, num_retries=3,
    ),
    # Runs twice; the report's diagram has the stages "evaluate base" and "evaluate tuned".
    "evaluate": Step(
        image="evaluate", module="tuneline.evaluate.run", stage="evaluate",
        cpu=("4", "16"), memory=("16Gi", "64Gi"), timeout_hours=24,
        gpu=True, hub=True, num_retries=2,
    ),
    "gate": Step(
        image="light", module="tuneline.gate.run", stage="gate",
        cpu=("1", "2"), memory=("1Gi", "4Gi"), timeout_hours=1, scratch=False,
    ),
    "report": Step(
        image="light", module="tuneline.report.run", stage=None,
        cpu=("500m", "1"), memory=("512Mi", "2Gi"), timeout_hours=1, scratch=False,
    ),
    "publish": Step(
        image="publish", module="tuneline.publish.run", stage="publish",
        cpu=("1", "4"), memory=("2Gi", "8Gi"), timeout_hours=12, hub=True, num_retries=3,
    ),
    "diagnose": Step(
        image="light", module="tuneline.diagnose.run", stage=None,
        cpu=("500m", "1"), memory=("512Mi", "1Gi"), timeout_hours=1, notifies=True, scratch=False,
    ),
}  # fmt: skip

EVERY_STEP = "all"
"""What stands for all steps where steps are named; no step has this name."""

IMAGE_SETS = tuple(dict.fromkeys(step.image for step in STEPS.values()))
"""Names of the dependency sets from which the images of the steps are built."""

if TYPE_CHECKING:
    StepName = str
else:
    StepName = Literal[tuple(STEPS)]
"""Name of a step in the table. Pydantic accepts only these names, and the JSON Schema lists
them."""


def steps_in(image_set: str) -> list[str]:
    """Return the names of the steps that run in the image of a dependency set."""
    return [name for name, step in STEPS.items() if step.image == image_set]
