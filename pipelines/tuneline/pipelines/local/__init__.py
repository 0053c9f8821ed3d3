"""Run a pipeline on this machine, and watch it."""
