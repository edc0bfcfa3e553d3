"""Ways of feeding a package, each compared with one full forward pass.

Prefill, chained decoding, batches, padding, long rows, ties, its own text. Chained decoding is checked against
something that has no cache at all. A longrope that switches its factors on the way is the exception: there only a
reference that is fed in the same pieces computes the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dense2moe.export.parity.agreement import LOGIT_ROWS
from dense2moe.export.parity.forward import Forward, Reference, choice_of, forward_of, read_scores
from dense2moe.export.parity.records import Check
from dense2moe.export.parity.taps import FedText, Seen, look
from dense2moe.export.parity.ties import TIE_MARGIN, before_flips, find_flips
from dense2moe.export.parity.ways.cases import Case
from dense2moe.export.runtime.decoder import Decoder


@dataclass(frozen=True)
class Errors:
    """The errors of one case.

    Errors of logits [B, L] of the last L tokens relative to the largest, and which of them are judged by them.
    """

    case: Case
    check: Check
    errors: torch.Tensor
    judged: torch.Tensor

    def judge(self, limit: float) -> Check:
        """The check, with a row's first token beyond the limit."""
        beyond = self.judged & ~(self.errors <= limit)
        places = (self.case.mask.cumsum(1) - 1)[:, -beyond.shape[1] :][beyond]
        if self.check.place is not None:
            return self.check
        return Check(**{**self.check.__dict__, "first_position": int(places.min()) if len(places) else None})


WayCheck = Callable[[Seen], tuple[str, int | None] | None]
"""What is wrong inside a graph in one way of feeding it, in words, and the first token of a row at which it is.

None where nothing is.
"""


@dataclass(frozen=True)
class CaseWatch:
    """How cases are watched: extra values, the places check, near-ties.

    Extra values are seen beside the decoder's taps.

    `tell` is called with the number of cases that are done.
    """

    values: Sequence[str]
    look_inside: WayCheck
    tie_margin: float = TIE_MARGIN
    tell: Callable[[int], None] = lambda _: None


def run_cases(decoder: Decoder, reference: Reference, cases: Sequence[Case], watch: CaseWatch) -> list[Errors]:
    """Compare each case with one full forward pass of the reference.

    Cases of one text that follow each other share it.
    """
    known: tuple[Case, Forward] | None = None
    errors = []
    for number, case in enumerate(cases):
        watch.tell(number)
        text = FedText(case.ids, case.mask, case.num_prefill)
        seen = look(decoder, text, [*decoder.taps, *watch.values], with_cache=True)
        if known is None or not known[0].shares_text(case, reference):
            known = None  # before the next is computed
            known = case, reference.forward(case.ids, case.mask, case.num_prefill)
        found = forward_of(seen, decoder)
        measured = measure_errors(case, found, known[1].seen_by(found), watch.tie_margin)
        errors.append(_with_place(measured, watch.look_inside(seen)))
    return errors


def run_cases_alone(
    decoder: Decoder, cases: Sequence[Case], routers: Sequence[str], watch: CaseWatch, share: float = 1.0
) -> list[Errors]:
    """Compare each case with the package's own full prefill.

    Of each row by itself. What computes in rounded numbers has no other equal: two graphs part where one rounds up and
    the other down, and so does a graph from itself, but no more than two equally rounded computations do. Where what
    experts are chosen by is seen (`routers`), what follows a near-tie flip in its row is left out; where it is not, the
    error of a case is that of the token beyond which `1 - share` of them lie.
    """
    prefills = _Prefills(decoder, routers)
    errors: dict[int, Errors] = {}
    # Of prefills that begin one text the longest comes first, so that the others are held against it.
    order = sorted(range(len(cases)), key=lambda n: -cases[n].ids.shape[1] if cases[n].is_plain else 1)
    for done, number in enumerate(order):
        case = cases[number]
        watch.tell(done)
        prefills.drop_all_but([cases[later] for later in order[done:]])
        text = FedText(case.ids, case.mask, case.num_prefill, case.num_logits)
        seen = look(decoder, text, [*watch.values, *routers], with_cache=True)
        found = prefills.read(seen)
        if case.num_prefill == case.ids.shape[1] and len(case.ids) == 1:
            prefills.keep(seen)
        expected = prefills.of(case, found.logits.shape[1])
        measured = measure_errors(case, found, expected, watch.tie_margin, share)
        errors[number] = _with_place(measured, watch.look_inside(seen))
    return [errors[number] for number in range(len(cases))]


def own_noise(errors: Sequence[Errors]) -> float:
    """The largest difference between a graph's prefills of one text."""
    return max((each.check.relative_error for each in errors if each.case.is_plain), default=0.0)


def _with_place(errors: Errors, wrong: tuple[str, int | None] | None) -> Errors:
    if wrong is None:
        return errors
    place, first = wrong
    return Errors(
        errors.case,
        Check(**{**errors.check.__dict__, "place": place, "first_position": first}),
        errors.errors,
        errors.judged,
    )


class _Prefills:
    """Full prefills of single rows; beginnings of known rows are reused."""

    def __init__(self, decoder: Decoder, routers: Sequence[str]) -> None:
        self._decoder, self._routers = decoder, routers
        self._known: list[tuple[list[int], Forward]] = []

    def keep(self, seen: Seen) -> None:
        """Keep a finished prefill, unless a longer one is known."""
        ids = seen.ids[0].tolist()
        if not any(longer[: len(ids)] == ids for longer, _ in self._known):
            self._known.append((ids, self.read(seen)))

    def drop_all_but(self, cases: Sequence[Case]) -> None:
        """Drop prefills that none of these cases is compared with."""
        rows = [ids[mask.bool()].tolist() for case in cases for ids, mask in zip(case.ids, case.mask, strict=True)]
        self._known = [each for each in self._known if any(each[0][: len(row)] == row for row in rows)]

    def of(self, case: Case, num_logits: int) -> Forward:
        """Each row's own full prefill, padded as the case is.

        With the logits of its last tokens.
        """
        parts = [
            self._row(ids[mask.bool()].tolist(), num_logits) for ids, mask in zip(case.ids, case.mask, strict=True)
        ]
        size = case.ids.shape[1]

        def padded(values: Sequence[torch.Tensor], width: int) -> torch.Tensor:
            return torch.cat([F.pad(value, (0, 0, width - value.shape[1], 0)) for value in values])

        routers = tuple(padded(layer, size) for layer in zip(*(part.routers for part in parts), strict=True))
        streams = tuple(router.new_zeros(*router.shape[:2], 1) for router in routers)
        return Forward(padded([part.logits for part in parts], num_logits), routers, streams, (), parts[0].choice)

    def _row(self, ids: list[int], num_logits: int) -> Forward:
        count = len(ids)
        for longer, known in self._known:
            first = len(longer) - known.logits.shape[1]  # that has logits
            start = max(0, count - num_logits)
            if longer[:count] == ids and first <= start:
                routers = tuple(router[:, :count] for router in known.routers if router is not None)
                return Forward(known.logits[:, start - first : count - first], routers, (), (), known.choice)
        row = torch.tensor([ids])
        self._known.append((ids, self.read(look(self._decoder, FedText.whole(row), self._routers))))
        return self._row(ids, num_logits)

    def read(self, seen: Seen) -> Forward:
        """Logits and selection scores by layer."""
        routers = [
            read_scores(seen.values[name].reshape(*seen.ids.shape, -1), name, self._decoder) for name in self._routers
        ]
        streams = tuple(router.new_zeros(*seen.ids.shape, 1) for router in routers)
        return Forward(seen.logits, tuple(routers), streams, (), choice_of(self._decoder))


def measure_errors(
    case: Case, found: Forward, expected: Forward, tie_margin: float = TIE_MARGIN, share: float = 1.0
) -> Errors:
    """Errors of logits, relative to the largest expected logit.

    A row is judged up to its first near-tie flip, and of all tokens the `share` with the smallest errors.
    """
    kept = found.logits.shape[1]
    real = case.mask[:, -kept:].bool()
    flips = find_flips(
        found.routers, expected.routers, found.hiddens, expected.hiddens, case.mask, expected.choice, tie_margin
    )
    judged = before_flips(flips, case.mask)[:, -kept:]
    parts = zip(
        *(logits.flatten(0, 1).split(LOGIT_ROWS) for logits in (found.logits, expected.logits[:, -kept:])), strict=True
    )
    error, mean_error, top1 = (
        torch.cat(each).view(real.shape) for each in zip(*(_by_token(*part) for part in parts), strict=True)
    )
    judged &= ~(error > error[judged].quantile(share)) if share < 1 and judged.any() else judged
    # a router that says no number has no expert that it chooses, and none that it could flip to
    judged |= error.isnan() & real
    largest = float(error[judged].max()) if judged.any() else 0.0
    size = torch.cat([part.abs().amax(-1) for part in expected.logits[:, -kept:].flatten(0, 1).split(LOGIT_ROWS)]).view(
        real.shape
    )
    # of a token whose embedding is zero, as a pad's may be
    scale = max(float(size[real].max()), torch.finfo(torch.float32).tiny)
    mean = float(mean_error[real].mean())
    check = Check(
        case.name,
        int(real.sum()),
        largest,
        mean,
        largest / scale,
        float(top1[real].float().mean()),
        int(flips.sum()),
        padded=not bool(case.mask.all()),
        decoded=case.num_prefill < case.ids.shape[1],
    )
    return Errors(case, check, error / scale, judged)


def _by_token(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest and mean logit difference, and top-1 agreement; each [T].

    The logits are [T, V].
    """
    error = (found - expected).abs_()
    return error.amax(-1), error.mean(-1), found.argmax(-1) == expected.argmax(-1)
