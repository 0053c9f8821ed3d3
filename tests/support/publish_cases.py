"""Publish the artifacts of a run in a process of its own, as the step does."""

import os
import subprocess
import sys
from pathlib import Path

from tuneline.quantize.config import QuantizeConfig
from tuneline.recipe import Recipe


def recipe_of(description: str = "") -> Recipe:
    return Recipe(
        name="mine",
        description=description,
        base_model="org/base",
        dataset="/home/someone/private/rows.jsonl",
        publish_to="org/somewhere",
        quantize=QuantizeConfig(gguf=("q8_0",), gptq=("gptq-4bit",)),
    )


def publish(
    run_dir: Path,
    target: str,
    out: str,
    *,
    exports: tuple[str, ...] = ("q8_0", "gptq-4bit"),
    description: str = "",
    **environment: str,
) -> subprocess.CompletedProcess:
    recipe = recipe_of(description)
    config = run_dir / "publish.json"
    config.write_text('{"max_attempts": 3}')
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [
            *(sys.executable, "-m", "tuneline.publish", "--config", str(config)),
            *("--target", target, "--recipe", recipe.model_dump_json()),
            *("--base-model", str(run_dir / "base"), "--dataset", str(run_dir / "dataset")),
            *("--adapter", str(run_dir / "adapter"), "--merged", str(run_dir / "merged")),
            *("--exports", *(str(run_dir / name) for name in exports)),
            *("--decision", str(run_dir / "decision"), "--published", str(run_dir / out)),
        ],
        env={**clean, "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def to_hub(run_dir: Path, hub, out: str, **changes: str):
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, **changes}
    return publish(run_dir, "me/mine", out, **environment)


TOKEN = "hf_" + "t" * 34  # the one that hub_server.py knows
REPOS = {
    "me/mine-lora": "adapter",
    "me/mine": "merged",
    "me/mine-gguf": "gguf",
    "me/mine-gptq-4bit": "gptq",
}
