"""From dense checkpoints to a fine-tuned mixture of experts."""
