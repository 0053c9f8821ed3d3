"""Check compiled pipelines and Kubernetes manifests for security problems."""
