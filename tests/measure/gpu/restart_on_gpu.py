"""Break ranks on real GPUs, and check that training continues as if nothing had happened.

    python tests/measure/gpu/restart_on_gpu.py              one GPU, and two if there are two
    python tests/measure/gpu/restart_on_gpu.py --ranks 2    two GPUs only
    python tests/measure/gpu/restart_on_gpu.py --tiny       a trial with two ranks on a CPU

For each number of ranks the same training runs twice. The second time, the last rank causes an
illegal memory access on its GPU in one step, by a kernel that writes to address 16, and is killed
by SIGKILL in a later step. Checked are:

    restarts    the step counted two restarts, and continued from the checkpoints before the faults
    losses      every step has the loss of the undisturbed run, within --tolerance
    adapter     whether the adapter is the same, bit for bit (reported only: some kernels add in an
                order that varies)
    memory      the GPU memory in use never exceeds that of the undisturbed run by more than 10 %,
                so each new process found the memory of the dead one freed; after the run it is as
                low as before

The exit code is the number of checks that failed. Weights and tokens are random.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_inputs
from gpu_inputs import Run, largest_difference, say

CUDA_FAULT_AT, KILL_AT = 4, 8
FAULTS_VARIABLE = "RESTART_ON_GPU_FAULTS"
"""Environment variable with a directory in which each fault is noted, so that it comes once."""
NUM_STEPS = 12
MIB = 2**20


def main() -> None:
    """Train with and without faults, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1, and 2 with two GPUs")
    parser.add_argument("--tolerance", type=float, default=2e-3, help="of a loss, in nats")
    parser.add_argument("--timeout", type=float, default=150, help="of a run, in seconds")
    parser.add_argument("--tiny", action="store_true", help="two ranks on a CPU")
    args = parser.parse_args()
    gpu_inputs.check_packages()
    import torch

    num_gpus = torch.cuda.device_count()
    ranks = args.ranks or ([2] if args.tiny else [1, 2][: max(1, num_gpus)])
    if max(ranks) > num_gpus and not args.tiny:
        raise SystemExit(f"this machine has {num_gpus} GPUs, not {max(ranks)}: try --tiny")
    name = torch.cuda.get_device_name() if num_gpus else "CPU"
    say(f"{num_gpus} x {name}, torch {torch.__version__}")
    work = gpu_inputs.roomy_directory(10**9)
    began = time.monotonic()
    try:
        base, dataset = _inputs(work, tiny=args.tiny)
        num_failed = sum(_compare(work, base, dataset, num, args) for num in ranks)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{num_failed} checks failed; {time.monotonic() - began:.0f} s in total")
    sys.exit(num_failed)


def _inputs(work: Path, *, tiny: bool) -> tuple[Path, Path]:
    base = work / "base"
    base.mkdir()
    gpu_inputs.write_base(base, "tiny" if tiny else "small")
    gpu_inputs.write_weights(base)
    max_token, pack = (500, 64) if tiny else (30000, 1024)
    lengths = gpu_inputs.gsm8k_lengths(pack * 4 * NUM_STEPS, scale=0.2 if tiny else 1.0)
    gpu_inputs.write_dataset(
        work / "dataset", lengths, max_seq_length=pack, num_eval_rows=4, max_token=max_token
    )
    return base, work / "dataset"


def _compare(
    work: Path, base: Path, dataset: Path, num_ranks: int, args: argparse.Namespace
) -> int:
    """Run the training twice and print the checks; return the number of those that failed."""
    whole, peak, _, _ = _train(work, base, dataset, f"whole_{num_ranks}", num_ranks, args)
    name = f"faults_{num_ranks}"
    found, peak_with_faults, before, after = _train(work, base, dataset, name, num_ranks, args)
    if not (whole.summary and found.summary):
        for run in (whole, found):
            say(f"{run.name}: exit code {run.code}: {run.log_tail}")
        return 1
    count = found.summary["num_restarts"]
    continued = [line for line in found.log if "restart " in line and "from the checkpoint" in line]
    apart = largest_difference(whole.losses, found.losses, range(1, NUM_STEPS + 1))
    weights = [
        (work / run.name / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in (whole, found)
    ]
    expected = zip((CUDA_FAULT_AT, KILL_AT), continued, strict=False)
    steps = [f"step {at}:" in line for at, line in expected]
    checks: list[tuple[str, str, bool | None]] = [
        ("restarts", f"{count} of 2", count == 2 and len(continued) == 2 and all(steps)),
        (
            "losses",
            f"{len(found.losses)} of {NUM_STEPS} steps, at most {apart:.2e} apart",
            len(found.losses) == NUM_STEPS and 0 <= apart <= args.tolerance,
        ),
        ("adapter", "bitwise equal" if weights[0] == weights[1] else "not bitwise equal", None),
    ]
    if not args.tiny:
        checks.append(
            (
                "memory",
                f"{before / MIB:.0f} MiB in use before, peak {peak_with_faults / MIB:.0f} MiB "
                f"({peak / MIB:.0f} undisturbed), {after / MIB:.0f} MiB after",
                peak_with_faults <= 1.1 * peak and after <= before + 64 * MIB,
            )
        )
    say(
        f"\n{num_ranks} rank(s): {whole.seconds:.0f} s undisturbed, "
        f"{found.seconds:.0f} s with faults"
    )
    for line in continued:
        say(f"    {line[:300]}")
    for check, text, passed in checks:
        verdict = "" if passed is None else "ok" if passed else "FAILED"
        say(f"{check:10} {verdict:8} {text}")
    return sum(passed is False for _, _, passed in checks)


def _train(
    work: Path,
    base: Path,
    dataset: Path,
    name: str,
    num_ranks: int,
    args: argparse.Namespace,
) -> tuple[Run, int, int, int]:
    """Train; return the run, and the GPU memory in use: its peak, before and after the run."""
    faults = work / f"{name}.faults"
    faults.mkdir()
    if name.startswith("whole"):
        for kind in ("cuda", "kill"):
            (faults / kind).touch()
    os.environ[FAULTS_VARIABLE] = str(faults)
    config: dict[str, Any] = {
        "max_steps": NUM_STEPS,
        "eval_steps": NUM_STEPS,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "num_ranks": num_ranks,
        "checkpoint_minutes": 0,
        "learning_rate": 1e-3,
        "sample_tokens": 0,
    }
    if args.tiny:
        config |= {"dtype": "float32", "optim": "adamw_torch"}
    before = _memory_in_use()
    peak = 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, _memory_in_use())

    run = gpu_inputs.train(
        name,
        config,
        base=base,
        dataset=dataset,
        work=work,
        timeout=args.timeout,
        program=(__file__, "--as-step"),
        every_poll=look,
    )
    time.sleep(2)
    return run, peak, before, _memory_in_use()


def _memory_in_use() -> int:
    """Return the bytes that all processes use on the machine's GPUs; 0 without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(int(line) for line in text.split()) * MIB


def train_with_faults(**arguments: Any) -> Any:
    """Train as `attempt.train`, but cause each fault once, on the last rank."""
    from tuneline.train import attempt
    from tuneline.train.ranks import collectives
    from tuneline.train.trainer.trainers import SupervisedTrainer

    faults = Path(os.environ[FAULTS_VARIABLE])
    is_last = collectives.rank() == collectives.num_ranks() - 1
    compute = SupervisedTrainer.compute_loss

    def compute_loss(trainer: Any, model: Any, *rest: Any, **named: Any) -> Any:
        step = trainer.state.global_step + 1
        for kind, at in (("cuda", CUDA_FAULT_AT), ("kill", KILL_AT)):
            if model.training and is_last and step == at and not (faults / kind).exists():
                (faults / kind).touch()
                _cause(kind)
        return compute(trainer, model, *rest, **named)

    SupervisedTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    return attempt.train(**arguments)


def _cause(kind: str) -> None:
    import torch

    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    import illegal_access

    illegal_access.write_to(16)
    torch.cuda.synchronize()


def _step(argv: list[str]) -> None:
    """Run the train step with `train_with_faults` in place of `attempt.train`."""
    import restart_on_gpu

    from tuneline.runtime.step import main as run_step
    from tuneline.train import TrainConfig, within_memory
    from tuneline.train.run import run

    # The ranks import this module by its name.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    within_memory.train = restart_on_gpu.train_with_faults  # type: ignore[assignment]
    run_step("train", TrainConfig, run, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-step"]:
        _step(sys.argv[2:])
    else:
        main()
