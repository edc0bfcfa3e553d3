"""The one error that a user can mend."""


class UpcycleError(ValueError):
    """A mistake in what the user gave; its text says where, what is, what must be and how to mend it, in one line."""


_NO_MEMORY = ("out of memory", "can't allocate memory", "bad allocation", "Failed to allocate memory")
"""How torch (CUDA's and the CPU's allocator) and onnxruntime say that memory ran out; neither has a type of its own for all of it."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, and nobody has said so yet in words of ours."""
    return isinstance(error, MemoryError) or (not isinstance(error, UpcycleError) and any(words in str(error) for words in _NO_MEMORY))
