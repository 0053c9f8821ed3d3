"""The JSON Schema of a strict model, as words: which keys there are, and what each may be."""
