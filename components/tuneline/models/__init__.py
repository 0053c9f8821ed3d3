"""What several steps do with a model: NF4, likelihoods, held-out rows, tokenizer files."""
