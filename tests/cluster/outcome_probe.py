"""Small pipelines that end in every way that a run can end, under the real exit handler.

    python tests/cluster/outcome_probe.py KIND REGISTRY [--no-cache]

submits one to KFP_HOST and prints the ID of the run. The pipeline of KIND has one step, `work`,
which is placed as `prepare` is, and `diagnose`. KIND `hold` and `promote` have the real gate, on
scores made by hand.
"""

import argparse
import os
from typing import Any

from kfp import Client, dsl

from tuneline import images
from tuneline.diagnose.component import diagnose
from tuneline.gate.component import gate
from tuneline.gate.config import GateConfig
from tuneline.pipelines.placement import place
from tuneline.placement import PlacementConfig

KINDS = (
    "good", "data-error", "crash", "killed", "memory", "time-limit", "disk", "wait", "image",
    "quota", "hold", "promote",
)  # fmt: skip
QUOTA_RESOURCE = "example.com/probe"
"""Extended resource that a quota of the test's namespace refuses."""


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def work(kind: str, seconds: int) -> str:
    """End in the given way.

    Args:
        kind: One of KINDS.
        seconds: Time to wait before.
    """
    import os
    import signal
    import time

    from tuneline.errors import DataError
    from tuneline.runtime.step import step

    with step("prepare"):
        time.sleep(seconds)
        if kind == "data-error":
            raise DataError(
                "31 of 90 rows were rejected, but at most 1 % may be (token hf_abcdefghijklmnop12)"
            )
        if kind == "crash":
            raise KeyError("answer")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "memory":
            blocks = [b"x" * 2**24 for _ in range(200)]
            print(len(blocks))
        if kind == "disk":
            with open("/scratch/large", "wb") as file:
                file.write(b"x" * 2**26)
            time.sleep(300)
    return kind


@dsl.component(base_image=images.LIGHT, install_kfp_package=False)
def make_scores(model: str, gain: float, scores: dsl.Output[dsl.Artifact]) -> None:
    """Write scores of one task on 40 samples.

    Args:
        model: "base" or "tuned".
        gain: Share of the samples that are right.
        scores: The scores.
    """
    import json
    from pathlib import Path

    from tuneline.artifacts import ModelOrigin, Scores, TaskScore
    from tuneline.gate import GateConfig
    from tuneline.record import Ancestor

    folder = Path(scores.path)
    (folder / "samples").mkdir(parents=True)
    rows = [{"id": str(i), "score": float(i < 40 * gain)} for i in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples" / "heldout_exact.jsonl").write_text(text)
    task = TaskScore(value=gain, metric="accuracy", higher_is_better=True, num_samples=40)
    record = Scores(model=model, tasks={"heldout_exact": task}, harness="none", seconds=0.0)
    origin = ModelOrigin(
        source="none",
        architecture="none",
        num_parameters=1,
        num_bytes=1,
        sha256="b" * 64,
        made_from={name: Ancestor(sha256=name[0] * 64) for name in ("dataset", "merged")},
    )
    record.write(folder, GateConfig(), parents=[origin])


def build(kind: str, registry: str, *, cached: bool) -> Any:
    """Return the pipeline of a kind."""
    small = {"cpu_request": "20m", "memory_request": "64Mi", "memory_limit": "256Mi"}
    steps = {name: dict(small) for name in ("prepare", "diagnose", "gate")}
    if kind in ("time-limit", "image"):
        steps["prepare"]["timeout_hours"] = 40 / 3600
    config = PlacementConfig.parse(
        {"registry": registry, "steps": steps, "scratch_size": "20Mi", "cache_claim": None}
    )

    @dsl.pipeline(name=f"probe-{kind}")
    def probe(seconds: int = 3) -> None:
        with dsl.ExitHandler(place(diagnose(), "diagnose", config).set_caching_options(False)):
            if kind in ("hold", "promote"):
                base = place(make_scores(model="base", gain=0.5), "prepare", config)
                gain = 0.5 if kind == "hold" else 1.0
                tuned = place(make_scores(model="tuned", gain=gain), "prepare", config)
                gated = place(
                    gate(
                        config=GateConfig().model_dump_json(),
                        base_scores=base.outputs["scores"],
                        tuned_scores=tuned.outputs["scores"],
                    ),
                    "gate",
                    config,
                )
                with dsl.If(gated.outputs["Output"] == "promote", name="promoted"):
                    place(work(kind="good", seconds=0), "prepare", config)
                return
            task = place(work(kind=kind, seconds=seconds), "prepare", config)
            task.set_caching_options(cached)
            if kind == "image":
                absent = images.in_registry(images.of_set("absent"), registry)
                task.set_container_image(absent)
            if kind == "quota":
                task.set_accelerator_type(QUOTA_RESOURCE).set_accelerator_limit(1)

    return probe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("registry")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    run = Client(host=os.environ["KFP_HOST"]).create_run_from_pipeline_func(
        build(options.kind, options.registry, cached=not options.no_cache),
        arguments={"seconds": options.seconds} if options.kind not in ("hold", "promote") else {},
        run_name=f"probe-{options.kind}",
        service_account="tuneline-runner",
        enable_caching=None if options.kind in ("hold", "promote") else not options.no_cache,
    )
    print(run.run_id)


if __name__ == "__main__":
    main()
