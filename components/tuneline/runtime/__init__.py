"""What every step runs inside: events, causes of failure, signals, the Kubernetes client."""
