"""Talk to a tuned model: in the terminal, on a local page, or through an OpenAI-compatible API."""
