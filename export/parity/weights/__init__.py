"""Rows of a package, found among the twin's."""
