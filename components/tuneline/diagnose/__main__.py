"""Run as `python -m tuneline.diagnose --events FILE [--state FAILED] [--summary FILE]`."""

import argparse
import sys

from tuneline.diagnose.run import run
from tuneline.runtime.step import step

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tuneline.diagnose",
        description="Explain why a run failed and what to change, or list what a run did.",
    )
    parser.add_argument("--events", help="events file of the run")
    parser.add_argument(
        "--state", default="FAILED", help="final state of the run: SUCCEEDED, FAILED or CANCELLED"
    )
    parser.add_argument("--message", default="", help="error message of the platform")
    parser.add_argument("--summary", help="Markdown file to write; default: standard output")
    arguments = parser.parse_args()
    with step("diagnose"):
        diagnosis = run(
            state=arguments.state,
            message=arguments.message,
            events_path=arguments.events,
            summary_path=arguments.summary,
        )
        if not arguments.summary:
            sys.stdout.write(diagnosis.markdown)
