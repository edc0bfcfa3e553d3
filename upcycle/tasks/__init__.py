"""What a model is for: heads, batches, losses and figures."""
