"""The one error that a user can mend."""


class ExportError(ValueError):
    """A mistake in what the user gave or asked for; its text says where, what is, what must be and how to mend it, in one line."""
