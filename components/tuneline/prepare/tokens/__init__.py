"""From an example to token IDs with a loss mask: templates, rendering, tokenising, truncation."""
