"""Graphs of architectures without a builder, traced and rewritten by passes."""
