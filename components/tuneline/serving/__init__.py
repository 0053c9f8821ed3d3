"""Serve what a run published: one KServe InferenceService per repository and format.

vLLM serves the merged model, GPTQ, AWQ and FP8 checkpoints, and the adapter beside its base model;
llama.cpp serves GGUF files. `manifests.py` writes the files of a repository. Where a server cannot
serve a model, a sentence takes the place of the file.
"""
