"""Stretches of a context: the best one, by scores of ends."""

from __future__ import annotations

import torch

LONGEST_ANSWER = 30
"""Tokens of the longest answer that is looked for, unless the training data has longer ones."""

_NEVER = -1e30  # a finite one: differences of two of them are numbers


def mask_ends(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, 2, S] in float32, with padding never chosen.

    `mask` [B, S] is 0 at padding.
    """
    return logits.float().masked_fill(mask[:, None] == 0, _NEVER)


def find_best_span(logits: torch.Tensor, spans: torch.Tensor, longest: int) -> tuple[float, int, int]:
    """The best answer of one window: its score, first and last token.

    The score is the sum of both logits; every pair of tokens of the context is asked, of at most `longest` tokens.

    Args:
        logits: of first and last token, [2, S].
        spans: where in the context each token stands, [S, 2]; the end is behind the start of the context's alone.
        longest: most tokens of an answer.
    """
    is_context = spans[:, 1] > spans[:, 0]
    first, last = logits.float().masked_fill(~is_context, _NEVER)
    scores_SS = first[:, None] + last[None, :]
    band_SS = torch.ones_like(scores_SS, dtype=torch.bool).triu().tril(longest - 1)
    place = int(scores_SS.masked_fill(~band_SS, 3 * _NEVER).argmax())
    start, end = divmod(place, scores_SS.shape[1])
    return float(scores_SS[start, end]), start, end


def score_none(logits: torch.Tensor, spans: torch.Tensor) -> float:
    """The score of no answer.

    Both logits of the token that stands for it, whose span is (0, 0).
    """
    place = int((spans == 0).all(-1).nonzero()[0, 0])
    return float(logits[0, place]) + float(logits[1, place])
