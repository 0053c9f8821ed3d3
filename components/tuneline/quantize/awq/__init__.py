"""Export to an AWQ checkpoint with gptqmodel."""
