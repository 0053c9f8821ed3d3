"""Routed experts of a mixture-of-experts model in NF4: load them, adapt them, compute them."""
