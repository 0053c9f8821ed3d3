"""What a run shows of itself: progress, cost, answers of the model, and an HTML page."""
