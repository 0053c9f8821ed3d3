"""Routed experts: sorting, products over dequantised experts, and the MLP made of them."""
