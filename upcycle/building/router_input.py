"""Norms that set the size of what a router reads.

The norm before the FFN; or, where norms follow attention and FFN, all that were added to the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping

from dense2moe.upcycle.building.pieces import Keep, Slice
from dense2moe.upcycle.checkpoints.tensors import TensorEntry
from dense2moe.upcycle.models.architecture import Stack
from dense2moe.upcycle.models.parts import Matrix, bias_name


def list_norms(stack: Stack, layer: int, entries: Mapping[str, TensorEntry]) -> tuple[Keep, ...]:
    """Weights and biases of the norms, as they are applied.

    Empty where a norm has no weights: its output has a variance of 1.
    """
    before = [norm for norm in (stack.parts.get("ffn_norm"), *stack.other_norms) if norm is not None]
    if before:
        stored = next((norm for norm in before if norm.name.format(layer=layer) in entries), None)
        assert stored is not None, f"{before[0].name} is not stored"
        both = (stored, Matrix(bias_name(stored.name)))
        return tuple(_keep(norm, layer, entries) for norm in both if norm.name.format(layer=layer) in entries)
    if not reads_residual(stack):
        return ()
    after = [stack.parts[part] for part in ("attention_post_norm", "ffn_post_norm")]
    earlier = [_keep(norm, number, entries) for number in range(layer) for norm in after]
    return (_keep(after[0], layer, entries), *earlier)


def reads_residual(stack: Stack) -> bool:
    """Whether FFNs read the residual stream itself."""
    return "ffn_norm" not in stack.parts and "attention_post_norm" in stack.parts


def _keep(norm: Matrix, layer: int, entries: Mapping[str, TensorEntry]) -> Keep:
    name = norm.name.format(layer=layer)
    return Keep(Slice(name, 0, entries[name].num_rows), norm.fold)
