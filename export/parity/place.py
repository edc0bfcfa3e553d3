"""Places inside a graph: a layer, a part, and their names."""

from __future__ import annotations

from typing import Literal, get_args

PlacePart = Literal[
    "embedding",
    "attention norm",
    "query, key and value",
    "cache",
    "attention",
    "attention output",
    "FFN norm",
    "router",
    "experts",
    "FFN",
    "residual stream",
    "layer",
    "final norm",
    "head",
]
PARTS: tuple[PlacePart, ...] = get_args(PlacePart)
"""In the order in which a forward pass comes to them."""

OUTSIDE = -1
"""The layer of what is outside of layers."""

Place = tuple[int, PlacePart]
ATTENTION_PARTS: tuple[PlacePart, ...] = ("query, key and value", "attention")
"""What shows of a way of feeding: positions, masks and the cache."""


OWN_INPUT = ", on the graph's own input"


def name_place(layer: int, part: PlacePart) -> str:
    """A place in words."""
    return _NAMES.get(part, part) if layer < 0 else f"layer {layer}, {_NAMES.get(part, part)}"


_NAMES: dict[PlacePart, str] = {
    "embedding": "the embedding",
    "head": "the head",
    "final norm": "the final norm",
    "cache": "the cached keys and values",
    "FFN norm": "the norm before the FFN",
    "attention norm": "the norm before attention",
    "attention": "attention, from its queries, keys and values",
    "attention output": "the output matrix of attention",
    "query, key and value": "the query, key and value projections",
    "FFN": "the FFN",
    "residual stream": "the residual stream after it",
    "layer": "the layer as a whole",
}
