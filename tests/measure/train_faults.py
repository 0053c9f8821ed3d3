"""Inject every fault that training must survive, and print a table of the results.

    python tests/measure/train_faults.py

The tests listed below inject the faults, including slow tests; they take some minutes on two cores.
"Survived" means that the test passed: the run ended with the adapter of an undisturbed run, or, if
no run can continue after the fault, it ended at once with an error that names the cause.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parents[1] / "train"

# The fault, the required outcome, and the test; a test without parameters stands for all its cases.
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
        "not resumed; logs the difference",
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
        "rollback to a lower rate",
        "trainer/test_nonfinite.py::test_several_in_a_row_go_back_to_a_lower_rate",
    ),
    (
        "NaN in every step",
        "ends, and names the rows",
        "trainer/test_nonfinite.py::test_rows_that_never_work_are_named",
    ),
    (
        "out of memory",
        "smaller micro-batch, same losses",
        "memory/test_plan.py::test_a_run_out_of_memory_goes_on_smaller_and_learns_the_same",
    ),
    (
        "out of memory with one example",
        "ends, and says what to lower",
        "memory/test_plan.py::test_memory_that_cannot_be_saved_ends_the_step",
    ),
    (
        "a rank is killed once",
        "restarted, bitwise equal (2 ranks)",
        "ranks/test_faults.py::test_a_killed_rank_is_replaced_and_nothing_else_changes",
    ),
    (
        "a rank is killed in the same step again",
        "ends, and says so",
        "ranks/test_faults.py::test_a_rank_that_dies_in_the_same_step_again_ends_the_run",
    ),
    (
        "a rank dies or fails",
        "all end at once, with its last log lines",
        "ranks/test_ranks.py::test_a_rank_that_dies_ends_all_at_once",
    ),
]


def main() -> None:
    """Run the tests in one process, and print one line per fault.

    The exit code is the number of faults that were not survived.
    """
    with tempfile.TemporaryDirectory() as root:
        results = Path(root, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--strict-markers"]
        command += ["--import-mode=importlib", f"--junitxml={results}"]
        subprocess.run(command + [f"{TESTS}/{test}" for _, _, test in FAULTS])
        cases = list(ElementTree.parse(results).iter("testcase"))
    print(f"\n{'fault':42} {'required outcome':41} {'survived':9} {'s':>6}")
    num_lost = 0
    for fault, outcome, test in FAULTS:
        name = test.partition("::")[2]
        matching = [case for case in cases if case.get("name", "").partition("[")[0] == name]
        seconds = sum(float(case.get("time", 0)) for case in matching)
        survived = _survived(matching)
        num_lost += survived == "no"
        print(f"{fault:42} {outcome:41} {survived:9} {seconds:6.1f}")
    sys.exit(num_lost)


def _survived(cases: list[ElementTree.Element]) -> str:
    if not cases or any(
        case.find(kind) is not None for case in cases for kind in ("failure", "error")
    ):
        return "no"
    return "not run" if any(case.find("skipped") is not None for case in cases) else "yes"


if __name__ == "__main__":
    main()
