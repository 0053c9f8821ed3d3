"""The Kubeflow pipeline of tuneline, and the command line that compiles and runs it."""
