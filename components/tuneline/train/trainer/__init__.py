"""The trainers: what happens in a step."""
