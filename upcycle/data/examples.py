"""Examples that `prepare_data` wrote, read back."""

from __future__ import annotations

from pathlib import Path

from dense2moe.upcycle.data.blocks import read_facts, read_tensors
from dense2moe.upcycle.data.held_out import Split
from dense2moe.upcycle.tasks.examples import Examples


def read_examples(directory: Path, split: Split) -> Examples:
    """The examples of a split that `prepare_data` wrote, with their domains.

    Raises:
        UpcycleError: there are none, or the file is damaged.
    """
    tensors = read_tensors(directory, split)
    domains = tensors.pop("domains")
    made = {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()}
    return Examples(made, domains.long(), read_facts(directory).get("image_tokens", 0))
