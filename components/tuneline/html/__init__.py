"""Self-contained HTML pages: layout, charts and the picture of the line."""
