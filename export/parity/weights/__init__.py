"""Rows of a package, found among those of the twin."""
