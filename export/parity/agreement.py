"""The package against one torch model on held-out text, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from dense2moe.export.parity.forward import Forward, Reference, forward_of, run_package, split_batches
from dense2moe.export.parity.records import Agreement, MarginBin
from dense2moe.export.parity.taps import FedText, Seen, look
from dense2moe.export.parity.ties import find_smallest_margin, same_experts
from dense2moe.export.runtime.decoder import Decoder
from dense2moe.upcycle.gates.choice import choice_margin
from dense2moe.upcycle.gates.gate import Choice

Follow = Callable[[Reference, Seen], Forward]
"""A reference on what a package was seen with."""
LOGIT_ROWS = 64
"""Tokens whose logits are compared at once.

What is made of them stays near the processor, and is not asked of the system anew each time.
"""
MARGIN_BOUNDS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)
"""Selection scores: router logits, or scores plus a bias; the last bin is open."""


@dataclass(frozen=True)
class Comparison:
    """The outcome of comparing a package with one torch model.

    Figures, the mean next-token losses of both sides by block, and parts that later tiers go on from. `margins` [N, S]
    is each token's smallest margin in the reference, None without routers. `factor`: the package's logits are so many
    times the reference's. `first` are the reference's logits on the first batch, and `routers` what its routers said
    there, where they are kept.
    """

    agreement: Agreement
    package_losses: list[float]
    reference_losses: list[float]
    margins: torch.Tensor | None
    choice: Choice | None
    factor: float
    first: torch.Tensor | None
    routers: dict[int, Any]


def compare(
    decoder: Decoder,
    reference: Reference,
    ids: torch.Tensor,
    tell: Callable[[int], None] = lambda _: None,
    watch: Callable[[torch.Tensor, Forward, Seen], None] = lambda *_: None,
    keeps_first: bool = False,
    follow: Follow | None = None,
    counted: torch.Tensor | None = None,
) -> Comparison:
    """Compare over all blocks of ids [N, S].

    `tell` is told how many blocks are done, and `watch` shown each batch and both sides of it, when they are compared.
    `keeps_first`: the first batch of the reference is in the result. `follow` runs the reference with what the
    package's routers said, so that no near-tie sends a token to other experts; the routing that is compared is then
    what its own routers would have said. `counted` [N, S]: the tokens that losses are of, where these are not all.
    """
    sums, margins = Sums(), []
    first: torch.Tensor | None = None
    routers: dict[int, Any] = {}

    def add(batch: torch.Tensor, own: torch.Tensor | None) -> Choice | None:
        nonlocal first, routers
        mask = torch.ones_like(batch)
        seen = look(decoder, FedText(batch, mask, batch.shape[1]), decoder.taps)
        expected = reference.forward(batch, mask) if follow is None else follow(reference, seen)
        if keeps_first and first is None:
            first, routers = expected.logits, dict(reference.routers)
        smallest = find_smallest_margin(expected.routers, expected.choice)
        margins.extend([] if smallest is None else [smallest])
        found = forward_of(seen, decoder)
        sums.add(found, expected.seen_by(found), batch, own)
        watch(batch, expected, seen)
        return expected.choice

    choice: Choice | None = None
    for batch in split_batches(ids, decoder.vocab_size):
        own = None if counted is None else counted[sums.tokens // ids.shape[1] :][: len(batch)]
        choice = add(batch, own)  # a call of its own, so that one batch of logits is in memory
        tell(sums.tokens // ids.shape[1])
    factor = sums.parts[0] / max(sums.parts[1], 1e-300)
    return Comparison(
        sums.agreement(), *sums.losses, torch.cat(margins) if margins else None, choice, factor, first, routers
    )


def measure_losses(
    model: Reference | Decoder,
    ids: torch.Tensor,
    tell: Callable[[int], None] = lambda _: None,
    counted: torch.Tensor | None = None,
) -> list[float]:
    """A model's mean next-token loss of each block of ids [N, S].

    `tell` is told how many blocks are done; `counted` [N, S] as in `compare`.
    """
    losses: list[float] = []
    for batch in split_batches(
        ids, int(model.model.config.vocab_size) if isinstance(model, Reference) else model.vocab_size
    ):
        losses += _block_losses(model, batch, None if counted is None else counted[len(losses) :][: len(batch)])
        tell(len(losses))
    return losses


def _block_losses(model: Reference | Decoder, batch: torch.Tensor, counted: torch.Tensor | None) -> list[float]:
    mask = torch.ones_like(batch)
    logits = (
        model.forward(batch, mask).logits
        if isinstance(model, Reference)
        else run_package(model, batch, mask, batch.shape[1]).logits
    )
    known = known_next(batch, counted)[:, :-1]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(known.shape)
    means = (losses * known).sum(-1, dtype=torch.float64) / known.sum(-1).clamp(min=1)
    return [float(mean) for mean in means]


def known_next(ids: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Places whose next token counts in a loss; bool [B, S].

    The last of a block foretells none that is known.
    """
    known = torch.zeros_like(ids, dtype=torch.bool)
    known[:, :-1] = True if counted is None else counted[:, 1:]
    return known


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL [...] in nats of logits `found` [..., V] from `expected`."""
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The mean of `divergence` over tokens, of logits [B, S, V]."""
    parts = zip(*(logits.flatten(0, 1).split(LOGIT_ROWS) for logits in (expected, found)), strict=True)
    return sum(float(divergence(*part).sum()) for part in parts) / found[..., 0].numel()


def factor_of(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Two sums whose ratio is the factor between two models' logits.

    Over logits [..., V] centred by token: found times expected, and expected squared.
    """
    product = square = 0.0
    for a, b in zip(*(logits.flatten(0, -2).split(LOGIT_ROWS) for logits in (found, expected)), strict=True):
        own = b - b.mean(-1, keepdim=True)
        product += float((a * own).sum(dtype=torch.float64))
        square += float((b * own).sum(dtype=torch.float64))
    return product, square


def _squares(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Squares of the difference and of the expected value."""
    return [float((found - expected).square().sum()), float(expected.square().sum())]


def _added(old: Sequence[list[float]], new: Sequence[list[float]]) -> list[list[float]]:
    return [[a + c, b + d] for (a, b), (c, d) in zip(old or [[0.0, 0.0]] * len(new), new, strict=True)]


def _ratio(squares: list[float]) -> float:
    return math.sqrt(squares[0] / max(squares[1], 1e-30))


@dataclass
class Sums:
    """Running sums of a comparison, for one batch of logits in memory."""

    tokens: int = 0
    predictions: int = 0
    max_error: float = 0.0
    mean_error: float = 0.0
    kl: float = 0.0
    kl_flipped: float = 0.0
    num_flipped: int = 0
    top1: float = 0.0
    top5: float = 0.0
    losses: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    parts: tuple[float, float] = (0.0, 0.0)
    _token_losses: tuple[list[torch.Tensor], list[torch.Tensor]] = field(default_factory=lambda: ([], []))
    same_routing: list[float] = field(default_factory=list)
    squares: list[list[float]] = field(default_factory=list)
    attended: list[list[float]] = field(default_factory=list)
    by_margin: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0] for _ in MARGIN_BOUNDS])

    def add(self, found: Forward, expected: Forward, ids: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Count one more batch of token ids [B, S].

        `counted` as in `compare`.
        """
        count = ids.numel()
        self.tokens += count
        following, known = torch.cat([ids[:, 1:], ids[:, :1]], 1), known_next(ids, counted)
        parts = zip(
            *(values.flatten(0, 1).split(LOGIT_ROWS) for values in (found.logits, expected.logits, following, known)),
            strict=True,
        )
        self._token_losses = ([], [])
        kl = torch.cat([self._add_logits(*part) for part in parts]).view(ids.shape)
        for own, tokens in zip(self.losses, self._token_losses, strict=True):
            sums = torch.cat(tokens).view(ids.shape).sum(-1, dtype=torch.float64)
            own += (sums / known.sum(-1).clamp(min=1)).tolist()
        product, square = factor_of(found.logits, expected.logits)
        self.parts = self.parts[0] + product, self.parts[1] + square
        self.kl += float(kl.sum())
        self.predictions += int(known.sum())
        flipped = self._add_routing(found, expected, count)
        self.kl_flipped += float(kl[flipped].sum())
        self.num_flipped += int(flipped.sum())
        self.squares = _added(
            self.squares, [_squares(a, b) for a, b in zip(found.hiddens, expected.hiddens, strict=True)]
        )
        seen = [
            (a, b) for a, b in zip(found.attended, expected.attended, strict=True) if a is not None and b is not None
        ]
        self.attended = _added(self.attended, [_squares(a, b) for a, b in seen])

    def _add_logits(
        self, found: torch.Tensor, expected: torch.Tensor, following: torch.Tensor, known: torch.Tensor
    ) -> torch.Tensor:
        """Add some tokens' logits [T, V] of both models.

        With the token that follows each [T], and whether that counts.

        Returns the KL of each, [T].
        """
        error = (found - expected).abs_()
        self.max_error = float(error.max().clamp(min=self.max_error))  # NaN stays NaN
        self.mean_error += float(error.mean()) * len(found)
        self.top1 += float((found.argmax(-1) == expected.argmax(-1)).sum())
        best, true_best = (logits.topk(min(5, logits.shape[-1]), dim=-1).indices for logits in (found, expected))
        self.top5 += float((best[..., None] == true_best[..., None, :]).any(-1).float().mean(-1).sum())
        log_q, log_p = found.log_softmax(-1), expected.log_softmax(-1)
        for n, log_probabilities in enumerate((log_q, log_p)):
            self._token_losses[n].append(-log_probabilities.gather(-1, following[:, None])[:, 0].where(known, 0.0))
        return (log_p.exp() * log_q.sub_(log_p).neg_()).sum(-1)

    def _add_routing(self, found: Forward, expected: Forward, count: int) -> torch.Tensor:
        """Count routing; returns which tokens [B, S] some layer routed differently."""
        flipped = torch.zeros(found.logits.shape[:2], dtype=torch.bool)
        same: list[float] = []
        for ours, theirs in zip(found.routers, expected.routers, strict=True):
            if ours is None or theirs is None:
                same.append(float(count))
                continue
            assert expected.choice is not None, "routers in a model that chooses no experts"
            agrees = same_experts(ours, theirs, expected.choice)
            same.append(float(agrees.sum()))
            flipped |= ~agrees
            margin = choice_margin(theirs, expected.choice)
            for n, (least, below) in enumerate(_bins()):
                inside = (margin >= least) & (margin < below)
                self.by_margin[n][0] += float(inside.sum())
                self.by_margin[n][1] += float((inside & agrees).sum())
        self.same_routing = [old + new for old, new in zip(self.same_routing or [0.0] * len(same), same, strict=True)]
        return flipped

    def agreement(self) -> Agreement:
        """The figures of all that was counted."""
        num_unflipped = self.tokens - self.num_flipped
        bins = zip(_bins(), self.by_margin, strict=True)
        margins = tuple(
            MarginBin(least, None if math.isinf(below) else below, int(count), same / count if count else None)
            for (least, below), (count, same) in bins
        )
        return Agreement(
            max_error=self.max_error,
            mean_error=self.mean_error / self.tokens,
            kl=max(self.kl / self.tokens, 0.0),  # rounding may leave less than nothing; NaN stays NaN
            top1_agreement=self.top1 / self.tokens,
            routing_agreement=tuple(same / self.tokens for same in self.same_routing),
            hidden_error=tuple(_ratio(squares) for squares in self.squares),
            attention_error=tuple(_ratio(squares) for squares in self.attended),
            top5_agreement=self.top5 / self.tokens,
            margins=margins if any(each.num_choices for each in margins) else (),
            flipped_share=self.num_flipped / self.tokens,
            kl_flipped=max(self.kl_flipped / self.num_flipped, 0.0) if self.num_flipped else None,
            kl_unflipped=max((self.kl - self.kl_flipped) / num_unflipped, 0.0) if num_unflipped else None,
        )


def _bins() -> list[tuple[float, float]]:
    return list(zip(MARGIN_BOUNDS, [*MARGIN_BOUNDS[1:], math.inf], strict=True))
