"""Errors in recipes and work directories that a user can mend."""

from dense2moe.upcycle.errors import MendableError


class RecipeError(MendableError):
    """Mistakes in a recipe, a line each.

    A line says where, what is, what must be and how to mend it.
    """


class ArtifactError(MendableError):
    """A mistake about a work directory or artifact, in one line."""
