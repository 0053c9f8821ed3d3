"""The errors whose messages are written for users.

    TunelineError
     |- UserError (ValueError)        the user can fix it: exit code 2
     |   |- RecipeError               an invalid recipe or config of a step
     |   |- DataError                 rows, files or columns of a dataset
     |   |- ModelError                a model directory or a model ID
     |   |- TaskError                 an evaluation task
     |   |- CredentialsError          a missing or refused token
     |   `- OutputExistsError         an output directory that is not empty
     `- WorldError (RuntimeError)     something outside the program: exit code 1
         |- StorageError              a disk is full or not writable
         |- HubError                  the model hub or the network
         |- ClusterError              Kubeflow Pipelines or Kubernetes
         |- ToolError                 a converter, another program or a package
         |- TrainingError             training did not complete
         |- StoppedError              the step received SIGTERM and can resume: exit code 143
         `- ProofError                an artifact failed its checks and is not used

A message states in a sentence or two the offending value, what is allowed, and what to try next.
"""


class TunelineError(Exception):
    """Base class of all errors whose message is written for users."""

    exit_code = 1


class UserError(TunelineError, ValueError):
    """A mistake of the user, who can fix it."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or a config of a step is invalid."""


class DataError(UserError):
    """A dataset cannot be used in its present form."""


class ModelError(UserError):
    """A model cannot be used in its present form."""


class TaskError(UserError):
    """An evaluation task is unknown or failed."""


class CredentialsError(UserError):
    """A token is missing or was refused."""


class OutputExistsError(UserError):
    """An output directory exists and is not empty."""


class WorldError(TunelineError, RuntimeError):
    """Something outside the program failed."""


class StorageError(WorldError):
    """A disk is full or not writable."""


class HubError(WorldError):
    """The model hub is unreachable or refused a request."""


class ClusterError(WorldError):
    """Kubeflow Pipelines or Kubernetes is unreachable or failed."""


class ToolError(WorldError):
    """A program that a step runs failed or is missing, or a package has the wrong version."""


class TrainingError(WorldError):
    """Training did not complete."""


class StoppedError(WorldError):
    """The step received SIGTERM, and can resume from the point at which it stopped."""

    # 128 + SIGTERM, as shells and Kubernetes report it.
    exit_code = 143


class ProofError(WorldError):
    """An artifact failed its checks (its proof) and is not used."""
