"""Ops: each file holds an equation, its Triton kernels and its plain-torch reference."""
