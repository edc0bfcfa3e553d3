"""Nodes of a graph: the writer, products, FFN gates, the embedding."""
