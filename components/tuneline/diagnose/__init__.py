"""Explain why a run failed and what to change, or list what a successful run did."""
