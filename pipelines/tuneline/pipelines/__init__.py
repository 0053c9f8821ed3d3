"""The line as a Kubeflow pipeline, and the command line that compiles and runs it."""
