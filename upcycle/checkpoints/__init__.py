"""Weights on disk: readers, writers, layers one at a time, whole models."""
