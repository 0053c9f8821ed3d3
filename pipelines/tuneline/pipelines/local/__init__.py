"""Run a pipeline on this machine and show its progress."""
