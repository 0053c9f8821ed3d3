"""Training on several nodes, as a TrainJob of Kubeflow Trainer."""
