"""Brief fine-tuning of the mixture and its dense controls."""
