"""Run the step alone: python -m tuneline.publish --help."""

from tuneline.publish import PublishConfig
from tuneline.publish.run import run
from tuneline.runtime.step import main

main("publish", PublishConfig, run)
