"""How many numbers share a scale in NF4 with double quantisation; importable without torch."""

BLOCKSIZE = 64
"""Number of consecutive weights that share a quantisation scale."""
NESTED_BLOCKSIZE = 256
"""Number of consecutive scales that share a scale of their own."""
