"""A model's tokenizer: its files, special tokens and chat templates."""
