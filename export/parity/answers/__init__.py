"""What a package answers to the examples of tasks."""
