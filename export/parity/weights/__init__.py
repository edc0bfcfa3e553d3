"""Rows of a package, looked up among the twin's."""
