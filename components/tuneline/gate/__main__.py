"""Run the step alone: python -m tuneline.gate --help."""

from tuneline.gate import GateConfig
from tuneline.gate.run import run
from tuneline.runtime.step import main

main("gate", GateConfig, run)
