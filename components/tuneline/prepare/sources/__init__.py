"""Where rows come from: files, datasets on the Hub, and built-in rows."""
