"""Run as `python -m tuneline.diagnose --events FILE [--state FAILED] [--summary FILE]`."""

import argparse
import sys

from tuneline.diagnose.run import run
from tuneline.runtime.step import step

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tuneline.diagnose", description=run.__doc__)
    parser.add_argument("--events", help="the events file of a run")
    parser.add_argument("--state", default="FAILED", help="SUCCEEDED, FAILED or CANCELLED")
    parser.add_argument("--message", default="", help="what the platform said")
    parser.add_argument("--summary", help="where to write the Markdown; default: standard output")
    given = parser.parse_args()
    with step("diagnose"):
        diagnosis = run(
            state=given.state,
            message=given.message,
            events_path=given.events,
            summary_path=given.summary,
        )
        if not given.summary:
            sys.stdout.write(diagnosis.markdown)
