"""Code for models that several steps share: NF4, likelihoods, held-out rows, tokenizer files."""
