"""What a broken parity limit means, and how to mend it."""

from __future__ import annotations

from dense2moe.convert.report.facts import ParityFacts
from dense2moe.export.parity.records import TIERS, ProviderParity, Tier

_MEANINGS: dict[Tier, str] = {
    "weights": "the file holds other weights than the checkpoint it was made from",
    "operator": "its routers or experts compute something else than the checkpoint it was made from",
    "layer": "a part of it computes something else than the checkpoint it was made from",
    "logits": "its outputs differ from its checkpoint's outputs",
    "language": "it predicts text worse than the recipe allows",
    "task": "it does a task worse than the recipe allows",
    "routing": "it sends tokens to other experts than the checkpoint it was made from",
    "files": "its tokenizer or settings differ from its checkpoint's",
}
_COSTS: tuple[Tier, ...] = ("language", "task")
"""Tiers that say what quantizing costs; the others say that the export is wrong."""
_SHOWN = 2  # broken limits in a sentence; the page has them all


def describe_failure(variant: str, parity: ParityFacts) -> str:
    """Why a variant failed, and what to do now."""
    broken = _find_broken(parity)
    shown, more = parity.breaches[:_SHOWN], len(parity.breaches) - _SHOWN
    limits = "; ".join([*shown, *([f"{more} more"] if more > 0 else [])])
    meaning = _MEANINGS[broken[0]] if broken else "no reason given" if not limits else ""
    told = f"{meaning} ({limits})" if meaning and limits else meaning or limits
    return f"parity FAILED: {told}. What now: {_find_remedy(variant, broken, ran=parity.measured is not None)}."


def _find_broken(parity: ParityFacts) -> list[Tier]:
    found = [each.tiers for each in parity.providers.values() if isinstance(each, ProviderParity)]
    return [tier for tier in TIERS if any(tiers.get(tier) == "broken" for tiers in found)]


def _find_remedy(variant: str, broken: list[Tier], *, ran: bool) -> str:
    if not ran:
        return "install an onnxruntime that can run this file, and run the recipe again"
    if broken == ["files"]:
        return "do not give this package away; copy the files named above from the checkpoint, or export it again"
    if broken and all(tier in _COSTS for tier in broken) and variant not in ("float32", "float16", "bfloat16"):
        return (
            f"take a variant with more bits than {variant}, calibrate on more text, or set wider limits under parity "
            "in the recipe"
        )
    return (
        "do not use this package; read in the report's part on parity which place is wrong, and try another "
        "export.lowering in the recipe"
    )
