"""Errors of a recipe and of a work directory that a user can mend."""

from dense2moe.upcycle.errors import MendableError


class RecipeError(MendableError):
    """Mistakes in a recipe; each line of its text says where, what is, what must be and how to mend it."""


class ArtifactError(MendableError):
    """Something about a work directory or an artifact that the user can mend; its text is one line."""
