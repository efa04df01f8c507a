"""What a batch, a loss, a metric and a prediction are, task by task."""
