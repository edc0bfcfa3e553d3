"""Gates as nodes: scores, choice, routes, and routes encoded as logits."""
