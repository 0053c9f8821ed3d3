"""Self-contained HTML pages: layout, charts and the diagram of a run's steps."""
