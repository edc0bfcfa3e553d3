"""Gates as nodes: scores, choice, routes, and routes told as logits."""
