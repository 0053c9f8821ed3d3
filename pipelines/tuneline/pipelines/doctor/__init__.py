"""Explain a failed or waiting run: cause, evidence, what to change."""
