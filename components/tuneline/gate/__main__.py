"""Run the step alone: python -m tuneline.gate --help."""

from tuneline.gate import GateConfig, run
from tuneline.step import main

main("gate", GateConfig, run)
