"""What all steps share: wrapper, events, causes of failure, signals, the Kubernetes client."""
