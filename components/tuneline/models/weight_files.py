"""File names of a transformers checkpoint's weights."""

SINGLE_FILE = "model.safetensors"
"""File with all weights of a checkpoint that is not split into shards."""
INDEX_FILE = "model.safetensors.index.json"
"""File of a split checkpoint that maps the name of each weight to the file that contains it."""
