"""Keep a process that needs only a tokenizer from importing torch.

transformers imports torch wherever it finds it, also for a tokenizer. That takes three seconds and
400 MiB, which every process forked later shares or copies.
"""

import os
import sys

_NAME = "torch"


def hide_torch() -> None:
    """Make torch unavailable to this process; call it before transformers is imported.

    The process cannot use models of transformers afterwards. If torch is imported already, nothing
    changes.
    """
    if _NAME not in sys.modules:
        # Python then raises ModuleNotFoundError for the import, as if torch were not installed.
        sys.modules[_NAME] = None  # type: ignore[assignment]
        # transformers would warn that it can only load tokenizers.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def show_torch() -> None:
    """Undo `hide_torch`, for code that imports torch itself.

    transformers has looked for torch by then, and goes on without it.
    """
    if sys.modules.get(_NAME, sys) is None:
        del sys.modules[_NAME]
