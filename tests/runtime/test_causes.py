"""Messages as the platforms and libraries write them, and the cause each must lead to."""

import re

import pytest

from tuneline.runtime.events import StepRun
from tuneline.runtime.failures.cause_table import CAUSES
from tuneline.runtime.failures.causes import explain, find_cause

MESSAGES = [
    (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 79.15 GiB",
        "gpu memory",
    ),
    ("task train failed: OOMKilled", "host memory"),
    ("main container failed with exit code 137", "host memory"),
    ("Error (exit code: 137)", "host memory"),
    ("MemoryError: ", "host memory"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator", "host memory"),
    ("OSError: [Errno 28] No space left on device", "disk"),
    ("SafetensorError: Error while serializing: IoError(Os { code: 28 }) os error 28", "disk"),
    ("Pod ephemeral local storage usage exceeds the total limit: ephemeral-storage", "disk"),
    ("RuntimeError: loss is nan at step 23", "not a number"),
    ("ValueError: the logits are not finite", "not a number"),
    (
        'pods "x" is forbidden: exceeded quota: tuneline, requested: requests.nvidia.com/gpu=1, '
        "used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8",
        "quota",
    ),
    (
        'pods "x" is forbidden: maximum memory usage per Container is 4Gi, but limit is 8Gi',
        "limit range",
    ),
    (
        "GatedRepoError: 403 Client Error. Access to model meta-llama/Llama-3 is restricted",
        "gated model",
    ),
    ("HfHubHTTPError: 401 Client Error: Unauthorized for url", "token"),
    ("HfHubHTTPError: 403 Forbidden: you have insufficient permissions", "forbidden"),
    ("RepositoryNotFoundError: 404 Client Error. Repository Not Found", "unknown repository"),
    ("RevisionNotFoundError: no revision v9", "unknown repository"),
    ('Back-off pulling image "tuneline/train:0.1.0": ImagePullBackOff', "image"),
    (
        "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "unschedulable",
    ),
    ("The node was low on resource: memory. Pod was Evicted", "evicted"),
    ("pod was preempted by a pod of higher priority", "evicted"),
    (
        "Pod was active longer than the specified deadline: DeadlineExceeded",
        "time limit",
    ),
    ("ReadTimeout: HTTPSConnectionPool: Read timed out.", "network"),
    ("grpc: DEADLINE_EXCEEDED: Deadline Exceeded", "network"),
    (
        "HfHubHTTPError: 403 Forbidden: Private repository storage limit reached, please upgrade",
        "hub storage",
    ),
    ("HfHubHTTPError: 402 Client Error: Payment Required for url", "hub storage"),
    ("HfHubHTTPError: 429 Client Error: Too Many Requests for url", "request limit"),
    ("wandb: ERROR Error while calling W&B API: user is not logged in (401)", "tracker"),
    (
        "ClientError: An error occurred (InvalidAccessKeyId) when calling ListObjects",
        "object store",
    ),
    ("ClientError: An error occurred (403) when calling the HeadObject operation", "object store"),
    (
        'trainjobs is forbidden: User "system:serviceaccount:ns:runner" cannot create resource',
        "service account",
    ),
    ("Failed to pull image: 401 Unauthorized", "image"),
    ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", "hanging rank"),
    ("SafetensorError: Error while deserializing header: HeaderTooLarge", "broken file"),
    ("container received SIGTERM", "terminated"),
    ("exited with code 143", "terminated"),
    ("ConnectionError: Max retries exceeded with url: /api/models", "network"),
    ("ValueError: all rows are longer than max_seq_length", "long rows"),
    ("JSONDecodeError: Expecting value: line 3 column 1", "bad rows"),
    ("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff", "bad rows"),
    ("KeyError: task 'kobest' not found in registry", "task"),
    ("ValueError: Tasks not found: kobest. Try `lm-eval --tasks {list_groups}`", "task"),
    ("The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi", "disk"),
    ("Component failed to execute successfully: exit status 137", "host memory"),
    ("0/3 nodes are available: 3 Insufficient ephemeral-storage.", "unschedulable"),
    ("pod deleted", "evicted"),
    ("ProofError: mean KL 0.5 is over the bound", "proof"),
    ("RuntimeError: No CUDA GPUs are available", "gpu driver"),
    ("RuntimeError: NCCL error in: ProcessGroupNCCL.cpp", "gpu driver"),
    ("ModuleNotFoundError: No module named 'gptqmodel'", "not installed"),
    ("PermissionError: [Errno 13] Permission denied: '/data'", "permission"),
]


@pytest.mark.parametrize(("message", "name"), MESSAGES)
def test_a_message_leads_to_its_cause(message: str, name: str) -> None:
    found = find_cause(message)
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    "message",
    [
        *("", "KeyError: 'x'", "ValueError: 40400 rows", "step took 1370 seconds", "banana loss"),
        # Lines of KFP's launcher and driver, and of libraries, which say nothing about a failure.
        "I1127 06:28:22.1 15 registry.go:68] No task-level plugins enabled, returning no-op "
        "dispatcher",
        "I1127 10:30:38.3 15 container.go:204] Created execution: last_known_state:CANCELED",
        '"activeDeadlineSeconds": "7200",',
        '"envVar": "HF_TOKEN",',
        '"num_rejected_rows": 0, "max_rejected_share": 0.1',
        "mean KL 0.0004, top-1 agreement 0.998",
        "NCCL version 2.20.5+cuda12.4",
        "CUDA driver version: 12.4",
        "loss of information: the value contains information",
        "step 401 of 403: 404 rows, timeout=60",
        "there is no task left, so no token is spent",
        "Preemption is not helpful for scheduling",
        "a malformed header was ignored",
    ],
)
def test_what_is_not_known_is_not_guessed(message: str) -> None:
    assert find_cause(message) is None


def test_each_cause_has_a_message_a_sentence_and_something_to_do() -> None:
    assert {name for _, name in MESSAGES} == {cause.name for cause in CAUSES}
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
    for cause in CAUSES:
        re.compile(cause.pattern)
        assert cause.why.endswith(".") and cause.advice.endswith(".")


WRONG_ADVICE = [
    # step, what failed, and words of advice that would not help
    ("publish", "403 Forbidden: Private repository storage limit reached", "token with"),
    ("train", "wandb: ERROR 401 Unauthorized", "HF_TOKEN"),
    ("train", "Failed to pull image: 401 Unauthorized", "HF_TOKEN"),
    ("fetch", "ReadTimeout: Read timed out.", "time limit"),
    ("fetch", "ReadTimeout: Read timed out.", "max_steps"),
    ("train", "NCCL Watchdog caught collective operation timeout", "timeout_hours"),
    ("merge", "JSONDecodeError: Expecting value: line 1 column 1", "max_rejected_share"),
    ("train", "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff", "max_rejected_share"),
    ("merge", "ProofError: 3 tensors were initialised anew", "raising the bound"),
    ("merge", "ProofError: 3 tensors were initialised anew", "merge.dtype"),
    ("train-on-nodes", 'User "system:serviceaccount:a:b" cannot create resource', "publish_to"),
    ("prepare", "HfHubHTTPError: 429 Client Error: Too Many Requests", "renew"),
]


@pytest.mark.parametrize(("step", "message", "words"), WRONG_ADVICE)
def test_no_advice_that_would_not_help(step: str, message: str, words: str) -> None:
    found = explain(StepRun(step, 0), message)
    assert find_cause(message, step) is not None
    assert words not in found.advice and words not in found.cause


def test_a_cause_of_one_step_is_not_guessed_in_another() -> None:
    message = "JSONDecodeError: Expecting value: line 3 column 1"
    assert find_cause(message, "prepare").name == "bad rows"
    assert find_cause(message, "merge").name == "broken file"


def test_advice_names_keys_that_recipes_have() -> None:
    from tuneline.recipe import Recipe

    for cause in CAUSES:
        for part, key in re.findall(r"\b([a-z]+)\.([a-z][a-z_]+)\b", cause.advice + cause.why):
            if part in Recipe.model_fields:
                config = Recipe.model_fields[part].annotation
                assert key in config.model_fields, f"{cause.name}: {part}.{key}"


def test_a_known_errors_own_sentence_wins() -> None:
    run = StepRun("prepare", 0, "failed", kind="DataError", message="line 7: no answer; add one")
    # The platform's message would lead elsewhere.
    assert explain(run, "OOMKilled").cause == "line 7: no answer; add one"


def test_a_librarys_error_is_explained_and_quoted() -> None:
    run = StepRun("train", 0, "failed", kind="OutOfMemoryError", message="CUDA out of memory.")
    found = explain(run)
    assert found.cause == "The GPU ran out of memory. (OutOfMemoryError: CUDA out of memory.)"
    assert "train.micro_batch_size" in found.advice


def test_an_unknown_error_is_quoted() -> None:
    found = explain(StepRun("train", 0, "failed", kind="KeyError", message="'x'"))
    assert found.cause == "The step raised KeyError: 'x'" and "traceback" in found.advice


def test_a_step_without_an_end_was_killed() -> None:
    found = explain(StepRun("train", 0, done=3, total=60))
    assert "after 3 of 60" in found.cause and "killed" in found.cause


def test_a_killed_step_with_the_platforms_word() -> None:
    assert explain(StepRun("train", 0), "exit code 143").cause.startswith(
        "The step was stopped by a person"
    )


def test_nothing_known_at_all() -> None:
    assert explain(None).cause == "No step reported an error."
    assert explain(None, "odd").cause == "The platform reports: odd"
