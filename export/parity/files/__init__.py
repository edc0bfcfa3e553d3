"""A package's tokenizer and configs beside the checkpoint's."""
