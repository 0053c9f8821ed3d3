"""Export to GGUF with llama.cpp, and prove the file."""
