"""Which rows are used, and for what: checked into a spool, split, and mixed."""
