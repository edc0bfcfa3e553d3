"""Routers in words: how they start, and what they learn from."""

from __future__ import annotations

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.numerals import format_share
from dense2moe.upcycle.training.config import RouterLosses

_STARTS = {
    "normal": "were drawn at random",
    "prototypes": "began as the mean hidden states of domains",
    "kmeans": "began as centres of clusters of hidden states",
    "ridge": "began as a ridge regression from hidden states to domains",
}
"""How routers start, by the recipe's word."""


def describe_routers(facts: ReportFacts) -> str:
    """How the routers came to be, in words; empty of older reports."""
    if facts.upcycle.router is None:
        return ""
    read = facts.upcycle.router_text_tokens
    tokens = f", on {sum(read):,} tokens" if read else ""
    losses = dict.fromkeys(map(describe_router_losses, facts.finetune.router_losses))
    learned = f" Beside the text's own loss they learned from: {'; then '.join(losses)}." if losses else ""
    return f"The routers {_STARTS[facts.upcycle.router]}{tokens}.{learned}"


def describe_router_losses(losses: RouterLosses) -> str:
    """The routers' losses of a phase, with their weights."""
    told = []
    if losses.domain_coefficient:
        fade = format_share(losses.domain_fade)
        told.append(f"domain loss {losses.domain_coefficient:g}, faded out at {fade} of the steps")
    if losses.balance_coefficient:
        told.append(f"balance loss {losses.balance_coefficient:g}")
    return " and ".join(told) or "nothing"
