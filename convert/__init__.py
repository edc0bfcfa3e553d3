"""From a recipe to artifacts: stages, command line, report."""
