"""Run the step as `python -m tuneline.quantize --format q4_k_m --merged DIR ...`."""

from tuneline.quantize import QuantizeConfig
from tuneline.quantize.run import run
from tuneline.runtime.step import main

if __name__ == "__main__":
    main("quantize", QuantizeConfig, run)
