"""Training on several machines, as a TrainJob of Kubeflow Trainer."""
