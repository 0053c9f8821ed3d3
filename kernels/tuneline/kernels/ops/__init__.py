"""Ops: each file has an equation, and Triton kernels and a plain-torch reference for it."""
