"""The gate of a sparse model, read from its config."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.gates.gate import Gate, TopK
from dense2moe.upcycle.gates.section import read_gate_section
from dense2moe.upcycle.models.table import EXPERT_COUNTS, TARGETS


def find_gate(config: Any) -> Gate | None:
    """The gate of a model's layers; None of a dense model.

    Of an architecture that is not in the table no more is known than how many experts a token visits: the top k of the
    router's logits.
    """
    target = next((target for target in TARGETS if target.model_type == config.model_type), None)
    return assume_gate(config) if target is None or target.experts is None else target.experts.gate(config)


def assume_gate(config: Any) -> Gate | None:
    """A softmax over the top k logits, whatever the architecture.

    What a section `mixture` says of it, in a package's config too; None for a dense model.
    """
    if isinstance(section := getattr(config, "mixture", None), dict):
        return read_gate_section(section)
    count = int(getattr(config, "num_experts_per_tok", None) or 0)
    sizes = (getattr(config, name, None) for name in EXPERT_COUNTS)
    return Gate(next((int(size) for size in sizes if size), count), TopK(count)) if count else None
