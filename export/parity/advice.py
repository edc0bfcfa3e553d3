"""Advice: the next thing to look at where a place is wrong.

What its first wrong token says, else what such a place has beside its weights.
"""

from __future__ import annotations

import re

from dense2moe.export.parity.place import PlacePart
from dense2moe.export.parity.records import PlaceCheck, WeightsCheck

_NORM = "epsilon, whether 1 is added to the weight, and which values it reads"
_LOOK_AT: dict[PlacePart, str] = {
    "embedding": "a factor after the lookup, and the ids that it reads",
    "attention norm": _NORM,
    "query, key and value": "the order of their rows, biases, and norms of query and key",
    "cache": "positions and rotary tables",
    "attention": "the scale and the mask of attention, and the order of its heads",
    "attention output": "a bias or a factor after it, and the order of heads that it reads",
    "FFN norm": _NORM,
    "router": "its bias, what it reads, and the type that it is computed in",
    "experts": "the order of experts and of gate and up, the activation, biases, and what router logits become as "
    "weights of experts",
    "FFN": "the activation, the order of gate and up, and biases",
    "residual stream": "factors and norms between attention or FFN and the residual stream",
    "layer": "epsilons, activation, masks and biases, and the order of experts",
    "final norm": _NORM,
    "head": "a factor, a cap or a bias after it",
}
_WEIGHTS: dict[PlacePart, str] = {
    "embedding": r"^the embedding$",
    "attention norm": r"norm$",
    "query, key and value": r"attention's (q|k|v)\w*$",
    "attention output": r"attention's (o_proj|dense)$",
    "FFN norm": r"norm$",
    "router": r", router",
    "experts": r", expert |shared",
    "FFN": r"(gate|up|down)_\w+$",
    "layer": r"",
    "final norm": r"^the final norm$",
    "head": r"^the head$",
}
"""Of the tensors in words, those that a place computes with; some places have none."""


def advise(check: PlaceCheck, weights: WeightsCheck | str) -> str:
    """Advice on a wrong place: its weights or first wrong token."""
    own = _WEIGHTS.get(check.part)
    if own is not None and not isinstance(weights, str):
        layer = f"layer {check.layer}, " if check.layer >= 0 else ""
        if any(wrong.tensor.startswith(layer) and re.search(own, wrong.tensor) for wrong in weights.wrong):
            return "its weights in the file are not the twin's: look at these first"
        if not weights.num_wrong and not weights.not_judged:
            return f"its weights are all in the file: look at {_LOOK_AT[check.part]}"
    return _start(check) or f"look at {_LOOK_AT[check.part]}"


def _start(found: PlaceCheck) -> str:
    """Advice on attention, from its first wrong token.

    The first token reads itself alone, whatever positions and mask are.
    """
    if found.part not in ("attention", "cache") or not found.first_position:
        return ""
    if found.part == "cache":
        right = "the first token is" if found.first_position == 1 else f"every token before {found.first_position} is"
        return f"{right} right: look at positions and rotary tables"
    if found.first_position == 1:
        return "a token that reads itself alone is right: look at positions and rotary tables"
    return f"every token before {found.first_position} is right: look at the window and the mask of attention"
