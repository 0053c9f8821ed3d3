"""Checkpoints of quantised weights: what GPTQ, AWQ and FP8 exports have in common."""
