"""Near-ties of routers: equal experts or not, and by what margin.

All of it is told of selection scores: router logits, or scores plus a bias where a gate chooses by these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dense2moe.upcycle.gates.choice import choice_margin, visit_mask
from dense2moe.upcycle.gates.gate import Choice

# selection scores; float32 noise in them is 1e-6 in a shallow model, so a flip above this margin is a fault and not a
# tie
TIE_MARGIN = 1e-4
_TIE_MULTIPLE = 8  # of the noise in them, where that is larger: two scores err, each a few times as much as torch does
_TIE_QUANTILE = 0.99  # of the noise over tokens: the few that flipped have differences that are no noise
# selection scores; below it the softmax may round two of them to one score, and then every operator has an order of its
# own
EXACT_TIE = 1e-6
# relative length of a difference of residual streams; float32 noise in them is 1e-6, another expert changes them by
# 1e-2 and more
MOVED = 1e-4
Routers = Sequence[torch.Tensor | None]


def same_experts(ours: torch.Tensor, theirs: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Whether two selection scores [..., E] choose equal sets; bool [...].

    Equal sets of experts, in any order.
    """
    return (visit_mask(ours, choice) == visit_mask(theirs, choice)).all(-1)


def find_smallest_margin(routers: Routers, choice: Choice | None) -> torch.Tensor | None:
    """The smallest margin [B, S] over layers; None without selection scores.

    Selection scores are [B, S, E].
    """
    margins = [choice_margin(layer, choice) for layer in routers if layer is not None and choice is not None]
    return torch.stack(margins).amin(0) if margins else None


def find_flips(
    ours: Routers,
    theirs: Routers,
    streams: Sequence[torch.Tensor],
    true_streams: Sequence[torch.Tensor],
    mask: torch.Tensor,
    choice: Choice | None,
    tie_margin: float = TIE_MARGIN,
) -> torch.Tensor:
    """Real tokens, bool [B, S].

    For which some layer chose other experts although the reference's margin there is below that of a near-tie. Where
    the tie is exact, scores cannot tell which experts an operator took, and the residual stream after the layer tells.
    """
    flips = torch.zeros_like(mask, dtype=torch.bool)
    for our_scores, their_scores, stream, true_stream in zip(ours, theirs, streams, true_streams, strict=True):
        if our_scores is None or their_scores is None:
            continue
        assert choice is not None, "routers in a model that chooses no experts"
        margin, own_margin = (choice_margin(scores, choice) for scores in (their_scores, our_scores))
        tied = torch.minimum(margin, own_margin) < EXACT_TIE
        moved = (stream - true_stream).norm(dim=-1) > MOVED * true_stream.norm(dim=-1)
        flips |= (~same_experts(our_scores, their_scores, choice) | (tied & moved)) & (margin < tie_margin)
    return flips & mask.bool()


def find_tie_margin(narrow: Routers, true: Routers) -> float:
    """The margin below which a choice of experts is a near-tie.

    From selection scores [B, S, E] in float32 and in float64.
    """
    differences = [
        (a - b).abs().amax(-1).flatten() for a, b in zip(narrow, true, strict=True) if a is not None and b is not None
    ]
    noise = max((float(layer.quantile(_TIE_QUANTILE)) for layer in differences), default=0.0)
    return max(TIE_MARGIN, _TIE_MULTIPLE * noise)


def before_flips(flips: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Real tokens [B, S] before their row's first flip: the judged ones."""
    return mask.bool() & (flips.cumsum(1) == 0)
