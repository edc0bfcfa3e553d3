"""Plans of the ways to feed a package text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import Reference

_BATCH_LENGTH = 128  # of the rows of a batch: where they lie and how they are padded shows in short ones as well
_NUDGE = 30.0  # of a router logit: no router is as sure
_NEAR_TIES = 4  # rows that end at the tokens of the text that are nearest to a tie


@dataclass(frozen=True)
class Case:
    """Real text, ids and mask [B, S], and how it is fed.

    A prefill of `num_prefill` tokens, then one token at a time. Logits are judged of a whole prefill, or of what is
    decoded and of the last token before: all of such a prefill is judged in a case of its own. Of a long one that a
    package is only held against itself, the last `num_logits` are.
    """

    name: str
    ids: torch.Tensor
    mask: torch.Tensor
    num_prefill: int
    num_logits: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is one row's prefill with all logits."""
        return (
            len(self.ids) == 1
            and self.num_prefill == self.ids.shape[1]
            and not self.num_logits
            and bool(self.mask.all())
        )

    def shares_text(self, other: Case, reference: Reference) -> bool:
        """Whether one forward pass of the reference serves both."""
        if not (torch.equal(self.ids, other.ids) and torch.equal(self.mask, other.mask)):
            return False
        return self.num_prefill == other.num_prefill or not reference.reads_in_pieces(self.ids.shape[1])


def plan_cases(
    blocks: torch.Tensor, context: int, window: int | None, margins: torch.Tensor | None, config: ParityConfig
) -> list[Case]:
    """Ways to feed a package text in blocks [N, S].

    `context` is the package's longest context.

    Where `margins` [N, S] are the reference's smallest by token.
    """
    size = min(blocks.shape[1], context)
    short, steps = max(2, size // 7), min(config.decode_steps, size - 1)
    start = size - steps
    alone = blocks[:1, :size]
    ones = torch.ones_like(alone)
    cases = [
        Case("prefill, batch 1, 1 token", alone[:, :1], ones[:, :1], 1),
        Case(f"prefill, batch 1, {short} tokens", alone[:, :short], ones[:, :short], short),
        Case(f"prefill, batch 1, {size} tokens", alone, ones, size),
        Case(f"{steps} decode steps after {start} tokens, batch 1", alone, ones, start),
    ]
    size = min(size, max(_BATCH_LENGTH, 2 * steps))
    start = size - steps
    batch = blocks[: min(3, len(blocks)), :size]
    ones = torch.ones_like(batch)
    if len(batch) > 1:
        cases.append(Case(f"{steps} decode steps after {start} tokens, batch {len(batch)}", batch, ones, start))
    if config.left_padding:
        padded = ones.clone()
        for row in range(1, len(batch)):
            padded[row, : start * row // len(batch)] = 0
        cases += [
            Case(f"prefill, batch {len(batch)}, {size} tokens, left padding", batch, padded, size),
            Case(f"{steps} decode steps after {start} tokens, batch {len(batch)}, left padding", batch, padded, start),
        ]
    elif len(batch) > 1:
        cases.append(Case(f"prefill, batch {len(batch)}, {size} tokens", batch, ones, size))
    cases += _long_cases(blocks, context, window, steps, config.longest_row)
    return cases + _tie_cases(blocks[:, :size], margins, config.left_padding)


def _long_cases(blocks: torch.Tensor, context: int, window: int | None, steps: int, longest_row: int) -> list[Case]:
    """A row of several blocks, up to context or `longest_row`.

    And decoding across the end of the window.
    """
    row = blocks.flatten()[None, : min(context, longest_row)]
    ones, size = torch.ones_like(row), row.shape[1]
    cases = []
    if size > blocks.shape[1]:
        what = "the whole context" if size == context else "of several blocks"
        cases = [
            Case(f"prefill, batch 1, {size} tokens, {what}", row, ones, size, steps + 1),
            Case(f"{steps} decode steps after {size - steps} tokens, batch 1, {what}", row, ones, size - steps),
        ]
    if window is not None and window < size:
        start, end = max(1, window - steps // 2), min(size, window + steps - steps // 2)
        cases.append(
            Case(
                f"{end - start} decode steps after {start} tokens, batch 1, across the window of {window}",
                row[:, :end],
                ones[:, :end],
                start,
            )
        )
    return cases


def every_expert(num_tokens: int, num_experts: int, count: int) -> torch.Tensor:
    """A nudge [T, E] of router logits that visits every expert.

    Tokens visit `count` experts, each expert beside every other.

    By more than any tie.
    """
    nudge = torch.zeros(num_tokens, num_experts)
    tokens = torch.arange(num_tokens)
    for place in range(count):
        step = 1 + tokens // num_experts % max(1, num_experts - 1)
        nudge[tokens, (tokens + place * step) % num_experts] += _NUDGE
    chosen = (nudge > 0).sum(-1)
    for token in (chosen < count).nonzero()[:, 0].tolist():  # steps that meet
        free = (nudge[token] == 0).nonzero()[: count - int(chosen[token]), 0]
        nudge[token, free] = _NUDGE
    return nudge.clamp(max=_NUDGE)


def _tie_cases(blocks: torch.Tensor, margins: torch.Tensor | None, left_padding: bool) -> list[Case]:
    """Rows that end where routing is nearest to a tie.

    One batch where padding is asked for, else the nearest alone.
    """
    if margins is None or not torch.isfinite(margins).any():
        return []
    flat = margins[:, : blocks.shape[1]].flatten()
    nearest = flat.argsort()[: _NEAR_TIES if left_padding else 1]
    rows = [blocks[place // blocks.shape[1], : place % blocks.shape[1] + 1] for place in nearest.tolist()]
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :] = row
        mask[n, width - len(row) :] = 1
    largest = float(flat[nearest].max())
    padding = ", left padding" if len(rows) > 1 else ""
    name = (
        f"prefill, batch {len(rows)}, rows that end nearest to a tie of experts (margin at most {largest:.0e}){padding}"
    )
    return [Case(name, ids, mask, width)]
