"""Inject every fault that training is to survive, and print a table of what came of it.

    python tests/measure/train_faults.py

The faults are injected by the tests named below, slow ones included; some minutes on two cores.
"Survived" says that a test passed: the run ended with the adapter it would have had, or, where no
run can go on, at once and with a sentence that names the cause.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parents[1] / "train"

# Fault, what has to come of it, and the test; without parameters it stands for all of them.
FAULTS = [
    (
        "SIGKILL, then SIGTERM, in training",
        "resumed, bitwise equal",
        "test_interruption.py::test_killed_then_stopped_then_finished",
    ),
    (
        "SIGKILL at 20 random moments",
        "resumed, bitwise equal",
        "test_interruption.py::test_twenty_kills_at_random_moments",
    ),
    (
        "SIGKILL of the step or of a rank, 6 times",
        "resumed, bitwise equal (2 ranks)",
        "test_interruption.py::test_ranks_and_their_step_are_killed_at_random_moments",
    ),
    (
        "SIGTERM in an evaluation (SFT, DPO)",
        "evaluation repeated, bitwise equal",
        "test_interruption.py::test_a_stop_in_an_evaluation_repeats_it",
    ),
    (
        "SIGTERM before early stopping",
        "patience and best adapter kept",
        "trainer/test_best_adapter.py::test_patience_and_the_best_adapter_survive_an_interruption",
    ),
    (
        "disk full while a checkpoint is written",
        "named; resumed, bitwise equal",
        "test_interruption.py::test_a_full_disk_costs_no_checkpoint",
    ),
    (
        "checkpoint half written",
        "never loaded",
        "test_checkpoints.py::test_what_a_killed_process_left_half_written_is_no_checkpoint",
    ),
    (
        "checkpoint damaged (4 ways)",
        "the one before it is used",
        "test_checkpoints.py::test_a_damaged_one_is_passed_over",
    ),
    (
        "optimizer state cut by a byte",
        "the one before it, bitwise equal",
        "test_interruption.py::test_a_damaged_checkpoint_gives_way_to_the_one_before_it",
    ),
    (
        "recipe changed",
        "not resumed; says what differs",
        "test_interruption.py::test_the_environment_names_the_root",
    ),
    (
        "second process on the same run",
        "refused",
        "test_checkpoints.py::test_one_process_at_a_time",
    ),
    (
        "NaN in a loss or a gradient",
        "step skipped and counted",
        "trainer/test_nonfinite.py::test_a_bad_step_changes_nothing_and_is_counted",
    ),
    (
        "NaN several times in a row",
        "back to a checkpoint, lower rate",
        "trainer/test_nonfinite.py::test_several_in_a_row_go_back_to_a_lower_rate",
    ),
    (
        "NaN for ever",
        "ends, and names the rows",
        "trainer/test_nonfinite.py::test_rows_that_never_work_are_named",
    ),
    (
        "out of memory",
        "goes on smaller, learns the same",
        "memory/test_plan.py::test_a_run_out_of_memory_goes_on_smaller_and_learns_the_same",
    ),
    (
        "out of memory with one row",
        "ends, and says what to lower",
        "memory/test_plan.py::test_memory_that_cannot_be_saved_ends_the_step",
    ),
    (
        "a rank dies or fails",
        "all end at once, its log's last lines",
        "ranks/test_ranks.py::test_a_rank_that_dies_ends_all_at_once",
    ),
]


def main() -> None:
    """Run the tests in one process, and print a line a fault; exit with the number not survived."""
    with tempfile.TemporaryDirectory() as root:
        results = Path(root, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--strict-markers"]
        command += ["--import-mode=importlib", f"--junitxml={results}"]
        subprocess.run(command + [f"{TESTS}/{test}" for _, _, test in FAULTS])
        cases = list(ElementTree.parse(results).iter("testcase"))
    print(f"\n{'fault':42} {'what has to come of it':38} {'survived':9} {'s':>6}")
    num_lost = 0
    for fault, outcome, test in FAULTS:
        name = test.partition("::")[2]
        found = [case for case in cases if case.get("name", "").partition("[")[0] == name]
        seconds = sum(float(case.get("time", 0)) for case in found)
        verdict = _verdict(found)
        num_lost += verdict == "no"
        print(f"{fault:42} {outcome:38} {verdict:9} {seconds:6.1f}")
    sys.exit(num_lost)


def _verdict(cases: list[ElementTree.Element]) -> str:
    if not cases or any(
        case.find(kind) is not None for case in cases for kind in ("failure", "error")
    ):
        return "no"
    return "not run" if any(case.find("skipped") is not None for case in cases) else "yes"


if __name__ == "__main__":
    main()
