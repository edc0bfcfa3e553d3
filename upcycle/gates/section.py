"""A gate in the config of our own mixtures.

It is `mixture.gate`, beside the numbers of experts. The gate of a section without `gate` is a softmax of which the k
largest are kept, renormalized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dense2moe.upcycle.gates.gate import Above, Choice, Gate, Mass, Near, TopK

_CHOICES: Mapping[str, type[Above] | type[Mass] | type[Near]] = {"threshold": Above, "top-p": Mass, "skip": Near}
TOP_K = "top-k"


def make_choice(name: str, value: float | None, most: int) -> Choice:
    """A choice by name: of at most `most` experts.

    `value` is its level or share.
    """
    if name == TOP_K:
        return TopK(most)
    assert value is not None, f"{name} has no value"
    return _CHOICES[name](value, most)


def describe_gate(gate: Gate) -> dict[str, Any]:
    """What a section says of a gate; nothing of the default."""
    plain = Gate(gate.num_experts, TopK(gate.max_experts_per_token))
    if gate == plain:
        return {}
    choice = gate.choice
    name = next((name for name, kind in _CHOICES.items() if isinstance(choice, kind)), TOP_K)
    told = {"score": gate.score, "choice": name, "renormalize": gate.renormalize}
    return (
        told
        if isinstance(choice, TopK)
        else told | {"value": choice.level if isinstance(choice, Above) else choice.share}
    )


def read_gate_section(section: Mapping[str, Any]) -> Gate:
    """The gate of a section `mixture`."""
    num_experts, most = int(section["num_experts"]), int(section["num_experts_per_tok"])
    told = section.get("gate") or {}
    choice = make_choice(told.get("choice", TOP_K), told.get("value"), most)
    return Gate(num_experts, choice, told.get("score", "softmax"), told.get("renormalize", True))
