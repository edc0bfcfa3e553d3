"""Limits of a variant, measured and configured, with their sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.forward import Forward
from dense2moe.export.parity.records import Limit, Noise, TaskKind
from dense2moe.export.parity.ties import find_tie_margin
from dense2moe.export.parity.ways.cases import Case
from dense2moe.export.parity.ways.feeding import measure_errors
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.variant import Variant

_OWN_MULTIPLE = 4.0
_OWN_LEAST = 0.05  # of the largest logit: what a deep model that rounds its activations differs by from itself
_LEAST_NOISE = 2.0**-24  # half a unit in the last place of float32: no sum is rounded to less


def measure_noise(exact: Forward, ids: torch.Tensor, found: Forward) -> Noise:
    """The difference of `found`, in float32, from `exact`, in float64.

    Both are forward passes of one model over ids [B, S]. Routers' ties are left out. Norms, rotary tables and the
    softmax of routers are float32 in both, as transformers has them; their rounding is in the figures.
    """
    mask = torch.ones_like(ids)
    narrow = _as_double(found)
    tie_margin = find_tie_margin(narrow.routers, exact.routers)
    check = measure_errors(Case("noise", ids, mask, ids.shape[1]), narrow, exact, tie_margin).check
    return Noise(max(check.relative_error, _LEAST_NOISE), check.num_tokens, tie_margin)


def _as_double(forward: Forward) -> Forward:
    def double(values: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if value is None else value.double() for value in values)

    hiddens = tuple(value.double() for value in forward.hiddens)
    return Forward(forward.logits.double(), double(forward.routers), hiddens, double(forward.attended), forward.choice)


def noise_limit(noise: float | None, config: ParityConfig, what: str, provider: str = CPU) -> Limit:
    """A multiple of float32's own error, capped by the absolute limit.

    On CUDA that alone holds: its products may round to TF32.
    """
    most = config.max_relative_error
    if provider != CPU:
        return Limit(
            most, "parity.max_relative_error; float32 products on CUDA may round their factors to TF32, 11 bits"
        )
    if noise is None:
        return Limit(most, f"parity.max_relative_error; the noise of float32 in {what} was not measured")
    value, multiple = config.noise_multiple * max(noise, _LEAST_NOISE), f"{config.noise_multiple:g} times"
    if value <= most:
        return Limit(
            value,
            f"{multiple} {max(noise, _LEAST_NOISE):.1e}, float32 torch's own error against float64 in {what} on this "
            "text",
        )
    return Limit(most, f"parity.max_relative_error; {multiple} the noise of float32 in {what} would be {value:.1e}")


def own_limit(noise: float, rounds: bool, config: ParityConfig) -> Limit:
    """Limit of logits without a twin: feeding ways against own prefill.

    Each way of feeding is compared with the package's own prefill.
    """
    least = _OWN_LEAST if rounds else config.max_relative_error
    said = (
        f"{_OWN_MULTIPLE:g} times the largest difference between the package's own prefills of one text, {noise:.1e} "
        "of the "
        "largest logit"
    )
    return Limit(
        max(least, _OWN_MULTIPLE * noise), said if _OWN_MULTIPLE * noise > least else f"{said}, and {least:g} at least"
    )


def configured_limits(variant: Variant, exact_twin: bool, config: ParityConfig) -> dict[str, Limit]:
    """Limits that the settings alone decide.

    Without a checkpoint of the package's own weights only the perplexity is held to one.
    """
    limits = {}
    if exact_twin:
        limits["kl"] = Limit(config.max_kl, "parity.max_kl")
        limits["routing"] = Limit(config.min_routing_agreement, "parity.min_routing_agreement")
    if variant in config.max_perplexity_increase:
        limits["perplexity"] = Limit(
            config.max_perplexity_increase[variant], f"parity.max_perplexity_increase.{variant}"
        )
    if config.tasks and variant in config.max_score_drop:
        limits["score"] = score_limit(variant, config)
    return limits


def score_limit(variant: Variant, config: ParityConfig) -> Limit:
    """The largest allowed drop of a task's score, if any."""
    most = config.max_score_drop.get(variant, math.inf)
    return Limit(most, f"parity.max_score_drop.{variant}, plus two standard errors")


def gap_limit(kind: TaskKind | Literal["labels"], limits: Mapping[str, Limit]) -> Limit | None:
    """The limit of a task's gap.

    A gap of logits, or of the last hidden state for similarity.

    None where there is none.
    """
    return limits.get("logits" if kind != "similarity" else "last hidden state")
