"""Base models in GGUF files: their headers, their tokenizers, and their weights as safetensors."""
