"""Run the step alone: python -m tuneline.publish --help."""

from tuneline.publish import PublishConfig, run
from tuneline.runtime.step import main

main("publish", PublishConfig, run)
