"""Run the step alone: python -m tuneline.gate --help."""

from tuneline.gate import GateConfig, run
from tuneline.runtime.step import main

main("gate", GateConfig, run)
