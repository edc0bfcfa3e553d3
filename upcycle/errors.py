"""The one error that a user can mend."""


class UpcycleError(ValueError):
    """A mistake in what the user gave; its text says where, what is, what must be and how to mend it, in one line."""
