"""Ops: each file holds one equation, its Triton kernel and its plain-torch reference."""
