"""The table of likely causes of failures that are not errors of tuneline.

The first cause whose pattern matches is used, so specific causes come before general causes. A
pattern matches what a library or the platform says when it fails, not what it may say in passing:
logs are full of timeouts, tokens, tasks and status codes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A likely cause of a failure, recognised by its error message."""

    name: str
    """Short name, unique in the table."""
    pattern: str
    """Regular expression to search for in the message, ignoring case."""
    why: str
    """What happened, in one sentence."""
    advice: str
    """What to change, in one sentence."""
    steps: tuple[str, ...] = ()
    """The steps in which the message has this cause; empty for all steps."""


_DATA_STEPS = ("prepare", "look-up-data")

CAUSES = (
    Cause(
        "gpu memory",
        r"cuda out of memory|outofmemoryerror|cuda error: out of memory|hip out of memory"
        r"|cublas_status_alloc_failed",
        "The GPU ran out of memory.",
        "Halve train.micro_batch_size (the result stays the same), lower prepare.max_seq_length, "
        "set train.gradient_checkpointing to true, or use a larger GPU. In the evaluate step, "
        "lower evaluate.batch_size.",
    ),
    Cause(
        "host memory",
        r"oomkilled|exit(ed with)? (code|status):? ?137\b|exit_code=137\b|exited with 137\b"
        r"|\bsignal:? (9|killed)\b|\bsigkill\b|cannot allocate memory|\bmemoryerror\b"
        r"|exit code:? ?-9\b|defaultcpuallocator",
        "The step was killed, most often because the pod's memory limit or the machine's memory "
        "was exhausted.",
        "Give the step more memory (the pod's memory limit), or lower prepare.max_seq_length or "
        "the batch size. If something else killed it, `tuneline resume RUN` repeats the step; "
        "training continues from its checkpoint.",
    ),
    Cause(
        "disk",
        r"no space left on device|os error 28\b|errno 28\b|disk quota exceeded|disk is full"
        r"|ephemeral local storage usage exceeds|low on resource: ephemeral-storage"
        r"|usage of emptydir volume",
        "The disk or the pod's ephemeral storage is full.",
        "Free some space, give the step a larger volume, or list fewer formats in quantize.gguf.",
    ),
    Cause(
        "not a number",
        r"loss (is|was|became|of) (nan|inf|not finite)\b|\bnan\b.*\bloss\b|\bloss\b.*\bnan\b"
        r"|(is|are|was|were|became) (not finite|non-?finite)\b|contains? (nans?|infs?)\b",
        "The loss or the logits became infinite or NaN.",
        "Lower train.learning_rate by a factor of 2 to 10, raise train.warmup_steps, and set "
        "train.dtype to bfloat16 or float32 instead of float16.",
    ),
    Cause(
        "quota",
        r"exceeded quota:",
        "The namespace's quota is used up, or is smaller than what the step requests.",
        "Wait for other runs to end, request less in placement, or have the quota raised; `kubectl "
        "describe resourcequota` shows the current use.",
    ),
    Cause(
        "limit range",
        r"is forbidden: .*\b(maximum|minimum) .* per (container|pod)",
        "The namespace's limit range does not allow the step's requests or limits.",
        "Change the step's requests and limits in placement.steps, or have the limit range "
        "changed; `kubectl describe limitrange` shows it.",
    ),
    Cause(
        "image",
        r"imagepullbackoff|errimagepull|errimageneverpull|invalidimagename|manifest unknown"
        r"|pull access denied|failed to pull image",
        "The step's container image could not be pulled.",
        "Push the images (`make images`) to the registry in placement.registry, and check the "
        "image pull secret. If placement.registry is local, load the images onto every node.",
    ),
    Cause(
        "gated model",
        r"gatedrepo|gated repo\b|access to (model|dataset) .* is restricted|awaiting a review",
        "The model or dataset is gated: its licence has to be accepted first.",
        "Accept the terms on its Hub page with the account that owns the token, and set HF_TOKEN.",
    ),
    Cause(
        "hub storage",
        r"storage (limit|quota) (reached|exceeded)|(private|public) (repository )?storage limit"
        r"|\b402 (client error|payment required)",
        "The account on the Hub has no storage left.",
        "Set publish.private to false, name fewer formats in the section quantize, "
        "delete old repositories, or take a larger plan; the token is not the cause.",
    ),
    Cause(
        "request limit",
        r"\b429 (client error|too many requests)|too many requests|rate.?limit(ed| exceeded)",
        "The Hub or another service limits the number of requests.",
        "Wait some minutes and run the recipe again; a request with a token has a higher limit.",
    ),
    Cause(
        "tracker",
        r"\bwandb\b.*\b(401|403|api.?key|permission denied)|\bmlflow\b.*\b(401|403|unauthorized)"
        r"|api key must (be|have)",
        "An experiment tracker refused its credentials.",
        "Set the tracker's variable, such as WANDB_API_KEY (on a cluster: placement.secrets), or "
        "remove the tracker from train.track.",
    ),
    Cause(
        "object store",
        r"invalidaccesskeyid|signaturedoesnotmatch|\baccessdenied\b|nosuchbucket"
        r"|\(403\) when calling the \w+ operation|s3.*\b403\b",
        "An object store refused the credentials, or has no such bucket.",
        "Check the bucket's name, and the credentials of the pod or of KFP's artifact store.",
    ),
    Cause(
        "service account",
        r"is forbidden: user \"?system:serviceaccount|cannot (get|list|create|watch|delete|patch) "
        r"resource",
        "The pod's service account lacks a permission in Kubernetes.",
        "Grant the service account the permission that the message names; manifests/ has the roles "
        "that the runs need.",
    ),
    Cause(
        "token",
        r"\b401 (client error|unauthorized)|\b401\)|status(_code| code)?[:=]? ?401\b|unauthorized"
        r"|invalid (username or password|user token)|token is required|no token (was )?found",
        "The Hub refused the request because the token is missing or invalid.",
        "Set HF_TOKEN (on a cluster: the secret that placement.hub_token_secret names) to a token "
        "with read access to base_model and dataset and write access to publish_to.",
    ),
    Cause(
        "forbidden",
        r"\b403 (client error|forbidden)|\b403\)|status(_code| code)?[:=]? ?403\b|\bforbidden\b"
        r"|insufficient permissions?\b",
        "A server refused the request: the account or its token lacks a permission.",
        "Read what the server says: if it is the Hub, use a token with read access to base_model "
        "and dataset and write access to publish_to.",
    ),
    Cause(
        "unknown repository",
        r"repositorynotfound|reponotfound|repository not found|revisionnotfound"
        r"|\b404 (client error|not found)|is not a valid model identifier",
        "The Hub has no such model, dataset or revision, or the token cannot read it.",
        "Check the spelling of base_model, dataset and fetch.revision. If the repository is "
        "private, set HF_TOKEN.",
    ),
    Cause(
        "unschedulable",
        r"\bunschedulable\b|failedscheduling|\b\d+/\d+ nodes are available"
        r"|insufficient (nvidia\.com/gpu|cpu|memory|ephemeral-storage)\b",
        "No node of the cluster has the free resources or the accelerator that the step requests.",
        "Lower placement.num_accelerators, correct placement.accelerator, or wait for a node. "
        "`kubectl describe pod` names the missing resource.",
    ),
    Cause(
        "evicted",
        r"\bevicted\b|\bpreempted\b|preemptionbyscheduler|spot interruption|\bpod (was )?deleted\b"
        r"|node (was )?(lost|not ?ready|shutdown)|terminated by node|disruptiontarget"
        r"|the node (was low on resource|had condition)",
        "The pod was evicted, or its node failed or was shut down.",
        "Run the recipe again: finished steps are taken from the cache. For long training, use "
        "nodes that are not preempted.",
    ),
    Cause(
        "hanging rank",
        r"watchdog caught collective operation timeout|collective operation timed out"
        r"|\bnccl\b.*\btimed? ?out",
        "A training process waited for another one that did not answer.",
        "Look for the first rank that failed in the step's log, and check the connection between "
        "the GPUs.",
    ),
    Cause(
        "time limit",
        r"pod was active longer|longer than the specified deadline|\bdeadlineexceeded\b"
        r"|activedeadlineseconds (was )?exceeded",
        "The step exceeded its time limit.",
        "Raise placement.steps.STEP.timeout_hours, or lower train.max_steps or evaluate.limit.",
    ),
    Cause(
        "terminated",
        r"\bsigterm\b|exit(ed with)? (code|status):? ?143\b|exited with 143\b"
        r"|\bsignal:? (15|terminated)\b|keyboardinterrupt",
        "The step was stopped by a person or by the cluster.",
        "If nobody stopped it, check for a drained node or a deadline, then run the recipe again.",
    ),
    Cause(
        "network",
        r"connectionerror|connection refused|connection reset|name or service not known"
        r"|temporary failure in name resolution|max retries exceeded|offline mode is enabled"
        r"|\btimed out\b|timeouterror|\w+timeout:|deadline exceeded",
        "The network or the Hub could not be reached.",
        "Check the proxy and HF_ENDPOINT, then run the recipe again. Without network access, set "
        "base_model and dataset to local directories.",
    ),
    Cause(
        "long rows",
        r"all rows (are|were) (longer|over max_seq_length)|\bno rows? ((is|are|was|were) )?left\b",
        "Every row was rejected or is longer than max_seq_length, so nothing is left to learn.",
        "Raise prepare.max_seq_length (auto uses the length that 99 % of the rows fit in), or "
        "read the reasons in rejected.jsonl.",
        steps=_DATA_STEPS,
    ),
    Cause(
        "bad rows",
        r"\brows? (was|were) rejected|malformed (row|line|json)|jsondecodeerror"
        r"|expecting value: line|unicodedecodeerror|error tokenizing data|arrowinvalid",
        "Rows of the dataset cannot be read.",
        "Fix the rows that the message names, or raise prepare.max_rejected_share to train "
        "without them.",
        steps=_DATA_STEPS,
    ),
    Cause(
        "broken file",
        r"jsondecodeerror|expecting value: line|unicodedecodeerror|header ?too ?(large|small)"
        r"|invalidheader|incompletemetadata|metadataincompletebuffer",
        "A file that the step reads is broken or was cut off.",
        "Run the step again that made the file, or download it again.",
    ),
    Cause(
        "task",
        r"\btasks? not found:|\btask '[^']*' (is )?(not found|unknown)|\bunknown tasks?:? '"
        r"|not found in (the )?(task )?registry",
        "lm-eval has no such task.",
        "Correct evaluate.tasks, or set evaluate.task_dir to the directory with the task's YAML "
        "file.",
    ),
    Cause(
        "proof",
        r"\bprooferror\b",
        "An artifact failed a check and is not used.",
        "Read the sentence of the step in its log: it names the check, and what would help.",
    ),
    Cause(
        "gpu driver",
        r"cuda driver version is insufficient|\bcuda error\b|found no nvidia driver"
        r"|no cuda gpus are|\bnccl (error|failure)|ncclsystemerror"
        r"|ncclinternalerror|ncclremoteerror",
        "The GPU or its driver reported an error.",
        "Check that the driver supports the image's CUDA version, then run the recipe again, on "
        "another node if the error recurs.",
    ),
    Cause(
        "not installed",
        r"modulenotfounderror|no module named '|importerror",
        "The environment lacks a package that the step needs.",
        "Install the step's extra (`pip install tuneline[...]`), or use the image of this version.",
    ),
    Cause(
        "permission",
        r"permissionerror|permission denied|errno 13\b|read-only file system",
        "The step has no permission to write to a directory or volume.",
        "Make the volume writable for the step's user, or use another directory.",
    ),
)
