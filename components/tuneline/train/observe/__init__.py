"""What a training run reports: progress, cost, answers of the model, and an HTML page."""
