"""Row formats: which columns a row of each format has, and how a row becomes an example."""
