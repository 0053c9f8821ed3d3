"""Answer one call of `worker.call`: `python -m tuneline.quantize.child_main DIRECTORY`."""

import logging
import pickle
import sys
import traceback
from pathlib import Path

from tuneline.quantize.child_process import ANSWER, CALL


def main(directory: Path) -> None:
    """Call what lies in the directory; put result or error beside it."""
    function, args, kwargs, level = pickle.loads((directory / CALL).read_bytes())
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    result, raised = None, None
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        error.add_note(traceback.format_exc())
        raised = error
    answer = pickle.dumps((result, raised))
    # Some exceptions cannot be made again: then this process ends with its traceback.
    pickle.loads(answer)
    (directory / ANSWER).write_bytes(answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
