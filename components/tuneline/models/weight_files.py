"""File names of a transformers checkpoint's weights."""

SINGLE_FILE = "model.safetensors"
"""All weights, where they are not split."""
INDEX_FILE = "model.safetensors.index.json"
"""Which file holds which weight, where they are split into several files."""
