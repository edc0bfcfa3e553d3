"""The order in which tensors are quantized."""

from __future__ import annotations

from collections.abc import Container, Mapping

from dense2moe.upcycle.models.architecture import Architecture
from dense2moe.upcycle.models.parts import layer_of


def order_tensors(names: Mapping[str, int], family: Architecture | None) -> list[str]:
    """Tensors in the order in which `quantize_tensors` yields them.

    Those outside of layers, then layer by layer, then what makes the logits.
    """
    last = head_name(names, family)
    return sorted(names, key=lambda name: (name == last, layer_of(name), name))


def head_name(names: Container[str], family: Architecture | None) -> str | None:
    """The tensor that makes the logits, tied or not.

    None where no family describes the model.
    """
    return None if family is None else family.name("head") if family.name("head") in names else family.name("embedding")
