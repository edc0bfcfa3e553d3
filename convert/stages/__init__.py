"""The stages, a file each: what decides a stage's output, what it needs, and what it does."""
