"""Nodes of a graph under construction: the writer, products, FFN gates, the embedding."""
