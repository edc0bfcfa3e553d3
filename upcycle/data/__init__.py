"""From text to blocks of token ids."""
