"""A page on 127.0.0.1 to talk to a model."""
