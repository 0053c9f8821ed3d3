"""Likely causes of failures that no step put in a sentence, and what to change.

A TunelineError says both itself; this table is for what kills a step from outside or rises from
a library. The first pattern that is found wins, so the particular stand before the general.
"""

import re
from dataclasses import dataclass

from tuneline import errors
from tuneline.runtime.events import StepRun

OWN_ERRORS = frozenset(
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.TunelineError)
)

RUN_AGAIN = "Mend it and run the recipe again: the steps before it come from the cache."


@dataclass(frozen=True)
class Cause:
    """What a message points to."""

    name: str
    pattern: str
    """Regular expression, looked for regardless of case."""
    why: str
    advice: str


@dataclass(frozen=True)
class Explanation:
    """Why a step failed, in a sentence, and what to change."""

    cause: str
    advice: str


CAUSES = (
    Cause(
        "gpu memory",
        r"cuda out of memory|outofmemoryerror|cuda error: out of memory|hip out of memory"
        r"|cublas_status_alloc_failed",
        "The GPU ran out of memory.",
        "Halve train.micro_batch_size, which does not change what is learned, "
        "lower prepare.max_seq_length, keep train.gradient_checkpointing on, or take a larger "
        "GPU; in evaluate lower evaluate.batch_size.",
    ),
    Cause(
        "host memory",
        r"oomkilled|exit code:? ?137|exit status:? ?137|exited with (code )?137|exit_code=137"
        r"|signal 9|sigkill|cannot allocate memory|\bmemoryerror\b|exit code:? ?-9\b"
        r"|defaultcpuallocator",
        "The machine or the pod's memory limit ran out, and the step was killed.",
        "Give the step more memory (the pod's memory limit), or lower prepare.max_seq_length or "
        "the batch size.",
    ),
    Cause(
        "disk",
        r"no space left on device|os error 28|errno 28|disk quota exceeded|disk is full"
        r"|ephemeral[- ](local )?storage",
        "The disk, or the pod's ephemeral storage, is full.",
        "Free some space or give the step a larger volume; ask for fewer formats in quantize.gguf.",
    ),
    Cause(
        "not a number",
        r"loss (is|was|became|of) (nan|inf|not finite)|\bnan\b.*loss|loss.*\bnan\b"
        r"|not finite|non-?finite|contains? (nan|inf)",
        "The numbers overflowed: the loss or the logits are not finite.",
        "Lower train.learning_rate (to a half or a tenth), raise train.warmup_steps, and use "
        "train.dtype bfloat16 or float32 instead of float16.",
    ),
    Cause(
        "gated model",
        r"gatedrepo|gated repo|access to model .* is restricted|awaiting a review",
        "The model or data set is gated: its licence has to be accepted first.",
        "Open its page on the Hub, accept the terms with the account whose token is used, and "
        "set HF_TOKEN.",
    ),
    Cause(
        "token",
        r"\b401\b|unauthorized|invalid (username or password|user token)|hf_token"
        r"|token is required|no token",
        "The Hub refused the request because a token is missing or not valid.",
        "Set HF_TOKEN (on a cluster: the secret that placement.hub_token_secret names) to a "
        "token that may read the source and write the target.",
    ),
    Cause(
        "forbidden",
        r"\b403\b|forbidden|insufficient permissions?",
        "The token, or the pod's service account, may not do this.",
        "Use a token with write access to publish_to, or ask for the permission in the message.",
    ),
    Cause(
        "unknown repository",
        r"repositorynotfound|reponotfound|repository not found|revisionnotfound|\b404\b"
        r"|is not a valid model identifier",
        "The Hub knows no such model, data set or revision, or the token may not see it.",
        "Check the spelling of base_model, dataset and fetch.revision; for a private one set "
        "HF_TOKEN.",
    ),
    Cause(
        "image",
        r"imagepullbackoff|errimagepull|invalidimagename|manifest unknown|pull access denied"
        r"|failed to pull image",
        "The step's container image could not be pulled.",
        "Push the images (`make images`) to a registry that the cluster reaches, and check its "
        "pull secret.",
    ),
    Cause(
        "unschedulable",
        r"unschedulable|failedscheduling|insufficient (nvidia\.com/gpu|cpu|memory)"
        r"|0/\d+ nodes are available|didn't match .*(affinity|selector|taint)",
        "No node of the cluster has room for the step, or none has the accelerator it asks for.",
        "Lower placement.num_accelerators, correct placement.accelerator, or wait for a node; "
        "`kubectl describe pod` names what is missing.",
    ),
    Cause(
        "evicted",
        r"\bevicted\b|preempt|spot interruption|node (was )?(lost|not ?ready|shutdown)"
        r"|terminated by node|disruptiontarget",
        "The pod was evicted or its node went away.",
        "Run the recipe again: finished steps come from the cache; for long training choose nodes "
        "that are not preempted.",
    ),
    Cause(
        "timeout",
        r"deadline ?exceeded|timed? ?out|timeouterror|activedeadlineseconds",
        "The step took longer than it was allowed to, or the network did not answer in time.",
        "Raise the time limit, take fewer steps (train.max_steps) or samples (evaluate.limit), or "
        "check the network.",
    ),
    Cause(
        "terminated",
        r"sigterm|exit code:? ?143|exit status:? ?143|exited with (code )?143|signal 15"
        r"|keyboardinterrupt|cancel+ed",
        "The step was asked to stop, by a person or by the cluster.",
        "If nobody stopped it, look for a drained node or a deadline; then run the recipe again.",
    ),
    Cause(
        "network",
        r"connectionerror|connection refused|connection reset|name or service not known"
        r"|temporary failure in name resolution|max retries exceeded|offline mode",
        "The network or the Hub could not be reached.",
        "Check the proxy and HF_ENDPOINT, then run the recipe again; without a network name a "
        "local directory as base_model and dataset.",
    ),
    Cause(
        "long rows",
        r"all rows .*(longer|max_seq_length)|no rows? (is|are|was|were)? ?left",
        "Every row is longer than max_seq_length or was refused, so nothing is left to learn.",
        "Raise prepare.max_seq_length (auto takes the length that 99 % of the rows fit in), or "
        "read rejected.jsonl.",
    ),
    Cause(
        "bad rows",
        r"rejected|malformed|jsondecodeerror|expecting value|unicodedecodeerror"
        r"|error tokenizing data|arrowinvalid",
        "Rows of the data set cannot be read.",
        "Mend the rows that the message names, or raise prepare.max_rejected_share if losing them "
        "is fine.",
    ),
    Cause(
        "task",
        r"task.*(not found|unknown|does not exist)|(unknown|no) task|not found in (the )?registry",
        "lm-eval knows no such task.",
        "Correct evaluate.tasks, or set evaluate.task_dir to the directory with its YAML file.",
    ),
    Cause(
        "proof",
        r"prooferror|mean kl|logit difference|top-?1 agreement",
        "An artifact failed its own check, and was not kept.",
        "Do not raise the bound first: use merge.base dequantized and merge.dtype float32, and see "
        "which layer differs.",
    ),
    Cause(
        "gpu driver",
        r"cuda (driver|error)|nvidia driver|no cuda gpus|nccl",
        "The GPU or its driver reported an error.",
        "See that the driver is new enough for the image's CUDA, then run the recipe again, "
        "on another node if it comes back.",
    ),
    Cause(
        "not installed",
        r"modulenotfounderror|no module named|importerror",
        "The environment lacks a package that the step needs.",
        "Install the step's extra (`pip install tuneline[...]`), or use the image of this version.",
    ),
    Cause(
        "permission",
        r"permissionerror|permission denied|errno 13|read-only file system",
        "The step may not write where it has to.",
        "Make the volume writable for the step's user, or choose another directory.",
    ),
)


def find_cause(text: str) -> Cause | None:
    """Return the first cause whose pattern is in the text."""
    return next((cause for cause in CAUSES if re.search(cause.pattern, text, re.I | re.S)), None)


def explain(run: StepRun | None, message: str = "") -> Explanation:
    """Explain a failure from the run that failed, and from what the platform said.

    Args:
        run: as `events.failed_run` gives it; none if no events were kept.
        message: the platform's error message.
    """
    if run is not None and run.kind in OWN_ERRORS:
        return Explanation(run.message, RUN_AGAIN)
    said = f"{run.kind}: {run.message}" if run is not None and run.kind else ""
    found = find_cause(f"{said}\n{message}")
    if found is not None:
        quoted = said or message
        return Explanation(f"{found.why} ({_short(quoted)})", found.advice)
    if said:
        return Explanation(
            f"The step raised {_short(said)}",
            "This is not an error that tuneline knows: read the traceback in the step's log, "
            "and report it with the recipe if the recipe looks right.",
        )
    if run is not None:
        reached = f" after {run.done} of {run.total}" if run.total else ""
        return Explanation(
            f"The step started and ended without a word{reached}: it was killed, most often for "
            "memory.",
            "Look at the pod's or the kernel's last state (OOMKilled, evicted); give the step more "
            "memory, or lower the batch size or prepare.max_seq_length.",
        )
    return Explanation(
        f"The platform says: {_short(message)}" if message else "No step reported an error.",
        "Read the log of the first task that is red in the run's graph.",
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
