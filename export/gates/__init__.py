"""Gates as nodes of a graph: scores, choice, routes, and weights told to operators as logits."""
