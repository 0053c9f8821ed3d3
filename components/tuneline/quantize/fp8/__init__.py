"""Export to an FP8 checkpoint with compressed-tensors."""
