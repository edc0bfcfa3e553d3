"""The one error that a user can mend."""

from dense2moe.upcycle.errors import MendableError


class RecipeError(MendableError):
    """Mistakes in a recipe; each line of its text says where, what is, what must be and how to mend it."""
