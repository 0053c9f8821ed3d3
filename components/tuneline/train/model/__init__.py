"""The model in training: adapter, initial weights, fused layers and number format."""
