"""Run `python -m tuneline.train` on one and on two GPUs, and compare what they learn and how fast.

    python tests/measure/gpu/ranks_on_gpu.py --out-dir DIR
    python tests/measure/gpu/ranks_on_gpu.py --parts big       some of the parts
    python tests/measure/gpu/ranks_on_gpu.py --tiny            a trial with two ranks on a CPU

    medium  a 1B shape: one rank; two ranks with ZeRO-2 and SIGTERM half-way, finished by one rank
    big     an 8B shape, packed to 8192 tokens: one rank and two ranks
    host    an 8B shape, packed to 2048 tokens, in the memory of a GPU with 8 GB, for which both
            tables go to host memory: one rank and two ranks
    scale   an 8B shape, packed to 8192 tokens, with four packs per step, on each number of ranks of
            --ranks, and with ZeRO-2 on the largest
    ddp     the 1B shape without ZeRO-2, with SGD and with AdamW: one rank and two ranks
    stock   the 1B shape with ZeRO-2 and without fused kernels: one rank and two ranks
    resume  the 1B shape on one rank, with SIGTERM half-way, then resumed to the end
    truth   the 1B shape on one rank without fused kernels, in float32: the difference of every
            other run of that shape from it

Every step has the same packs on any number of ranks, so the losses should be equal up to rounding.
Tokens per second are over all ranks, by wall-clock time. Weights and tokens are random.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import gpu_inputs
from gpu_inputs import Run, largest_difference, say, train

PARTS = ("medium", "big", "host", "scale", "ddp", "stock", "resume", "truth")
WARM_UP = 6
"""First step whose speed counts; earlier steps may compile kernels."""


def main() -> None:
    """Run the parts one after another until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="for the part scale")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out-dir", type=Path, default=Path("."), help="for ranks.json and logs")
    parser.add_argument("--work-dir", type=Path, help="for base models; default: /dev/shm or disk")
    parser.add_argument(
        "--deadline", type=float, default=180, help="start no run after this many seconds"
    )
    parser.add_argument("--tiny", action="store_true", help="two small layers and short rows")
    args = parser.parse_args()
    gpu_inputs.check_packages(*(() if args.tiny else ("deepspeed",)))
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus < 2 and not args.tiny:
        raise SystemExit(f"this machine has {num_gpus} GPUs, but two are needed: try --tiny")
    name = torch.cuda.get_device_name() if num_gpus else "CPU"
    work = args.work_dir or gpu_inputs.roomy_directory(0 if args.tiny else 20 * 10**9)
    say(f"{num_gpus} x {name}, torch {torch.__version__}, {work}")
    try:
        comparison = Comparison(work, args.out_dir, args.steps, args.tiny, args.deadline)
        comparison.run(args.parts, args.ranks)
    finally:
        if args.work_dir is None:
            shutil.rmtree(work, ignore_errors=True)


class Comparison:
    """Runs the parts and compares their losses and speeds."""

    def __init__(
        self, work: Path, out_dir: Path, num_steps: int, tiny: bool, deadline: float
    ) -> None:
        self.work, self.out_dir = work, out_dir
        self.num_steps, self.tiny = num_steps, tiny
        self.began = time.monotonic()
        self.deadline = deadline
        self.results: dict[str, Any] = {}

    def run(self, parts: list[str], ranks: list[int]) -> None:
        """Run some of the parts; `scale` on each of these numbers of ranks."""
        if "medium" in parts:
            self.medium(*self.small())
        if "big" in parts:
            self.pair("big", *self.inputs("Llama-3.1-8B", pack=8192, packs_per_step=2), forwards=2)
        if "host" in parts:
            inputs = self.inputs("Llama-3.1-8B", pack=2048, packs_per_step=2)
            gib = gpu_inputs.SMALL_GPU_GIB
            with gpu_inputs.capped(gib * gpu_inputs.GIB):
                self.pair("host", *inputs, forwards=2, memory_gib=gib, fit="auto")
        if "scale" in parts:
            self.scale(*self.inputs("Llama-3.1-8B", pack=8192, packs_per_step=4), ranks)
        if "ddp" in parts:
            self.pair("ddp", *self.small(), forwards=4, optim="sgd", learning_rate=0.5)
            self.pair("ddp_adamw", *self.small(), forwards=4)
        if "stock" in parts:
            settings = {"kernels": "off", "sharding": "zero2"}
            self.pair("stock", *self.small(), forwards=4, **settings)
        if "resume" in parts:
            half = self.num_steps // 2
            self.train("resume", *self.small(), num_ranks=1, forwards=4, stop_at=half)
            self.train("resume", *self.small(), num_ranks=1, forwards=4)
        if "truth" in parts:
            self.truth(*self.small())
        say(f"{time.monotonic() - self.began:.0f} s in total")

    def small(self) -> tuple[Path, Path]:
        """Write the base model and the dataset that all parts except `big` use."""
        return self.inputs("Llama-3.2-1B", pack=4096, packs_per_step=4)

    def medium(self, base: Path, dataset: Path) -> None:
        """Compare one rank with two ranks that are stopped, after which one rank resumes."""
        half = self.num_steps // 2
        zero2: dict[str, Any] = {"forwards": 4, "sharding": "zero2"}
        one = self.train("medium_1", base, dataset, num_ranks=1, forwards=4)
        stopped = self.train("medium_2", base, dataset, num_ranks=2, stop_at=half, **zero2)
        if stopped is not None:
            say(f"medium_2: stopped with exit code {stopped.code}: {stopped.log_tail[-300:]}")
            rate = stopped.tokens_per_second(min(WARM_UP, half - 1))
            say(f"medium_2: {rate:.0f} tok/s on 2 ranks until then")
        resumed = self.train(
            "medium_2", base, dataset, num_ranks=1, forwards=4, as_name="then_1", **zero2
        )
        if one is None or resumed is None:
            return
        before = largest_difference(one.losses, resumed.losses, range(1, half + 1))
        after = largest_difference(one.losses, resumed.losses, range(half + 1, self.num_steps + 1))
        say(
            f"medium: losses of one rank and of two differ by at most {before:.4f} in steps 1 to "
            f"{half}, and by {after:.4f} after one rank resumed (-1: no steps in common)"
        )

    def pair(self, name: str, base: Path, dataset: Path, forwards: int, **settings: Any) -> None:
        """Compare one rank with two ranks.

        Args:
            name: Name of the part.
            base: Directory of the base model.
            dataset: Directory of the dataset.
            forwards: Micro-batches per optimizer step, over all ranks.
            settings: Fields of TrainConfig.
        """
        one = self.train(f"{name}_1", base, dataset, num_ranks=1, forwards=forwards, **settings)
        two = self.train(f"{name}_2", base, dataset, num_ranks=2, forwards=forwards, **settings)
        if one is None or two is None:
            return
        apart = largest_difference(one.losses, two.losses, range(1, self.num_steps + 1))
        gain = two.tokens_per_second(WARM_UP) / one.tokens_per_second(WARM_UP)
        say(
            f"{name}: losses differ by at most {apart:.4f} over {self.num_steps} steps (-1: no "
            f"steps in common); two ranks are {gain:.2f} x as fast as one"
        )

    def scale(self, base: Path, dataset: Path, ranks: list[int]) -> None:
        """Compare several numbers of ranks that share four packs per step with the first number."""
        first: Run | None = None
        for num_ranks, sharding in [*((n, "ddp") for n in ranks), (max(ranks), "zero2")]:
            name = f"scale_{num_ranks}_{sharding}"
            settings = {"num_ranks": num_ranks, "forwards": 4, "sharding": sharding}
            run = self.train(name, base, dataset, **settings)
            first = first or run
            if run is None or first is None:
                return
            apart = largest_difference(first.losses, run.losses, range(1, self.num_steps + 1))
            gain = run.tokens_per_second(WARM_UP) / first.tokens_per_second(WARM_UP)
            say(f"{name}: {gain:.2f} x the speed of {ranks[0]}; losses within {apart:.4f}")

    def truth(self, base: Path, dataset: Path) -> None:
        """Compare the results of the same shape with those in float32."""
        settings = {"kernels": "off", "dtype": "float32"}
        run = self.train("truth", base, dataset, num_ranks=1, forwards=4, **settings)
        if run is None:
            return
        for name, result in self.results.items():
            if not name.startswith(("truth", "big", "host", "scale")):
                steps = range(1, self.num_steps + 1)
                apart = largest_difference(run.losses, result["losses"], steps)
                say(f"{name}: losses are within {apart:.4f} of float32's (-1: no steps in common)")

    def inputs(self, shape: str, *, pack: int, packs_per_step: int) -> tuple[Path, Path]:
        """Write a base model and a dataset, unless they exist.

        Args:
            shape: Name of the model's shape, a key of gpu_inputs.SHAPES.
            pack: Tokens per pack.
            packs_per_step: Packs per optimizer step, over all ranks.
        """
        start = time.monotonic()
        if self.tiny:
            shape, pack = "tiny", pack // 32
        base, dataset = self.work / f"base-{shape}", self.work / f"dataset-{shape}-{pack}"
        if not base.exists():
            gpu_inputs.write_base(base, shape)
            gpu_inputs.write_weights(base)
        if not dataset.exists():
            gpu_inputs.write_dataset(
                dataset,
                gpu_inputs.gsm8k_lengths(
                    self.num_steps * pack * packs_per_step, scale=0.1 if self.tiny else 1.0
                ),
                max_seq_length=pack,
                num_eval_rows=pack // 128,
                max_token=500 if self.tiny else 30000,
            )
        say(f"{shape}: written in {time.monotonic() - start:.0f} s")
        return base, dataset

    def train(
        self,
        name: str,
        base: Path,
        dataset: Path,
        *,
        num_ranks: int,
        forwards: int,
        stop_at: int | None = None,
        as_name: str = "",
        **settings: Any,
    ) -> Run | None:
        """Run the train step, unless the time is up.

        Args:
            name: Name of the run; runs of the same name share checkpoints.
            base: Directory of the base model.
            dataset: Directory of the dataset.
            num_ranks: Number of ranks.
            forwards: Micro-batches per optimizer step, over all ranks.
            stop_at: Send SIGTERM after this step; None lets the run end.
            as_name: Name in the results; empty uses `name`.
            settings: Fields of TrainConfig.
        """
        shown = as_name or name
        if time.monotonic() - self.began > self.deadline:
            say(f"{shown}: not started: {self.deadline:.0f} s have passed")
            return None
        config = {
            "max_steps": self.num_steps,
            "warmup_steps": 2,
            "global_batch_size": forwards,
            "micro_batch_size": 1,
            "num_ranks": num_ranks,
            "optim": "adamw_torch",
            "learning_rate": 2e-4,
            "eval_steps": self.num_steps,
            **settings,
        }
        files = {"base": base, "dataset": dataset, "work": self.work}
        run = train(name, config, **files, stop_at=stop_at)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        (self.out_dir / f"ranks_{shown}.log").write_text("\n".join(run.log))
        if stop_at is None:
            say(run.show(WARM_UP))
            self.results[shown] = {
                "tokens_per_second": run.tokens_per_second(WARM_UP),
                "losses": run.losses,
                **{name: value for name, value in run.summary.items() if name != "history"},
            }
            (self.out_dir / "ranks.json").write_text(json.dumps(self.results, indent=1))
        return run


if __name__ == "__main__":
    main()
