"""Gates as nodes of a graph, and the same in torch."""
