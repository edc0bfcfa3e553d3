"""The recipe: one YAML file that drives the whole conversion."""
