"""The adapter, the fused layers and the number format of the model in training."""
