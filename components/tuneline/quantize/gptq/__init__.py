"""Export to a GPTQ checkpoint with gptqmodel."""
