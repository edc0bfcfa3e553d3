"""Tables of merging: how far sources are from the base, and soups."""

from __future__ import annotations

from collections.abc import Iterator

from dense2moe.convert.report.facts import UpcycleFacts
from dense2moe.convert.report.grid import Grid
from dense2moe.convert.report.numerals import NONE, format_share, format_special
from dense2moe.convert.report.summary import Verdict
from dense2moe.upcycle.building.facts import SoupLook

_BASE = "the dense model"


def distance_table(upcycle: UpcycleFacts) -> Grid:
    """Each source's distance from the base, by class of tensor."""
    classes = list(dict.fromkeys(kind for found in upcycle.distances for kind in found.by_class))
    rows = (
        (
            found.name,
            f"{upcycle.experts.count(found.name)}",
            *(format_share(found.by_class[kind]) if kind in found.by_class else NONE for kind in classes),
        )
        for found in upcycle.distances
    )
    return Grid(("Source", "Experts a layer", *classes), tuple(rows))


def soup_table(upcycle: UpcycleFacts) -> Grid:
    """Every look of a greedy soup."""
    rows = ((_name_soup(look), _format_loss(look), "kept" if look.kept else "tried") for look in upcycle.soup)
    return Grid(("Averaged", "Held-out loss, nats", "Kept"), tuple(rows))


def judge_soup(upcycle: UpcycleFacts) -> Iterator[Verdict]:
    """What a greedy soup averaged and left out, in one sentence."""
    if not upcycle.soup:
        return
    last = max((look for look in upcycle.soup if look.kept), key=lambda look: len(look.models))
    best = next(look for look in upcycle.soup if look.kept)
    left_out = [
        f"{_name(look.models[-1])} ({_format_loss(look)} with it)"
        for look in upcycle.soup
        if not look.kept and len(look.models) > 1
    ]
    if len(last.models) == 1:
        kept = f"is {_name_soup(last)} alone (held-out loss {_format_loss(last)} nats)"
    else:
        kept = (
            f"averaged {_name_soup(last)} (held-out loss {_format_loss(last)} nats; the best alone, "
            f"{_name_soup(best)}, {_format_loss(best)})"
        )
    ending = f", and left out {', '.join(left_out)}" if left_out else ""
    yield Verdict(f"Outside of experts the greedy soup {kept}{ending}.", None)


def _name_soup(look: SoupLook) -> str:
    return " + ".join(map(_name, look.models))


def _name(model: str) -> str:
    return model or _BASE


def _format_loss(look: SoupLook) -> str:
    return format_special(look.loss) or f"{look.loss:.4f}"
