"""The errors that a person is meant to read.

    TunelineError
     |- UserError (ValueError)        the caller can mend it: exit code 2
     |   |- RecipeError               a recipe or a step's config
     |   |- DataError                 rows, files and columns of a data set
     |   |- ModelError                a model directory or a model id
     |   |- TaskError                 an evaluation task
     |   |- CredentialsError          a token that is missing or refused
     |   `- OutputExistsError         a directory that would be overwritten
     `- WorldError (RuntimeError)     the world can mend it: exit code 1 (StoppedError: 143)
         |- StorageError              disk full, not writable
         |- HubError                  the model hub or the network
         |- ClusterError              Kubeflow Pipelines or Kubernetes
         |- ToolError                 a converter or another program failed
         |- TrainingError             training did not end as it should
         |- StoppedError              the step was told to stop, and can be continued
         `- ProofError                an artifact failed its own check, and was not kept

A message is one sentence or two: the offending value, what is allowed, the next thing to try.
"""


class TunelineError(Exception):
    """Base of every error with a message for people."""

    exit_code = 1


class UserError(TunelineError, ValueError):
    """The caller's mistake."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or a step's config is not valid."""


class DataError(UserError):
    """A data set cannot be used as it is."""


class ModelError(UserError):
    """A model cannot be used as it is."""


class TaskError(UserError):
    """An evaluation task is unknown or broken."""


class CredentialsError(UserError):
    """A token is missing or was refused."""


class OutputExistsError(UserError):
    """An output directory has something in it already."""


class WorldError(TunelineError, RuntimeError):
    """Something outside the program failed."""


class StorageError(WorldError):
    """A disk is full or cannot be written."""


class HubError(WorldError):
    """The model hub could not be reached or refused."""


class ClusterError(WorldError):
    """Kubeflow Pipelines or Kubernetes could not be reached, or failed."""


class ToolError(WorldError):
    """A program that a step relies on failed."""


class TrainingError(WorldError):
    """Training did not end as it should."""


class StoppedError(WorldError):
    """The step was told to stop, and can be continued where it was."""

    exit_code = 143
    # What a shell and Kubernetes report for a process that SIGTERM ended.


class ProofError(WorldError):
    """An artifact failed its own check."""
