"""Causes of a failure: what a log says, and what a person can do about it."""
