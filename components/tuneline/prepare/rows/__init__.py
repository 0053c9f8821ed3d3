"""Rows before tokenisation: check them, store them in a spool, split them, mix in general rows."""
