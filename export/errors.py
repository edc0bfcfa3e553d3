"""The error that a user can mend."""

from dense2moe.upcycle.errors import MendableError


class ExportError(MendableError):
    """A mistake in what the user gave or asked for.

    Its text says where, what is, what must be and how to mend it, in one line.
    """
