"""The one error that a user can mend."""


class RecipeError(ValueError):
    """Mistakes in a recipe; each line of its text says where, what is, what must be and how to mend it."""
