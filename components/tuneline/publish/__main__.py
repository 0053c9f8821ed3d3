"""Run the step alone: python -m tuneline.publish --help."""

from tuneline.publish import PublishConfig, run
from tuneline.step import main

main("publish", PublishConfig, run)
