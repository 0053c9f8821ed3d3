"""Row formats: which columns a row has, and how it becomes an example."""
