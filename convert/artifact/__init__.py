"""Artifacts: sealed stage outputs in a work directory."""
