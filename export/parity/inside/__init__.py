"""Places inside a graph, each judged on its own input."""
