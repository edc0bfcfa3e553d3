"""The judge: every broken limit in one line that names tier and place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from export.parity.limits import gap_limit
from export.parity.records import TIERS, Check, Divergence, LayerCheck, Limit, OperatorCheck, Part, ProviderParity, Tier


def find_breaches(result: ProviderParity) -> list[tuple[Tier, str]]:
    """Every limit that the figures break, the tiers in their order; a figure without a limit is not judged."""
    return [*_operator(result), *_layer(result), *_logits(result), *_language(result), *_task(result), *_routing(result)]


def _operator(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    limits = result.limits
    if isinstance(result.operators, str):
        return
    for check in result.operators:
        router, output = limits.get(f"router of layer {check.layer}"), limits.get(f"experts of layer {check.layer}")
        if router is not None and not check.router_error <= router.value:
            yield "operator", f"layer {check.layer}, router logits on the reference's own input: relative error {_over(check.router_error, router)}"
        if output is not None and not check.output_error <= output.value:
            yield "operator", f"layer {check.layer}, {_wrong_experts(check)}: relative error {_over(check.output_error, output)}"


def _wrong_experts(check: OperatorCheck) -> str:
    given = "on the reference's own input"
    if check.factors is not None and len(check.experts) != 1:
        least, largest = check.factors
        return (
            f"experts {given}, each token's output a multiple of the reference's, {least:.2f} to {largest:.2f} times (are the weights renormalized?)"
        )
    match check.experts:
        case ():
            return f"experts {given}, none of them in every token"
        case (expert,):
            return f"expert {expert} {given}"
        case _:
            return f"experts {', '.join(map(str, check.experts))} {given}"


def find_divergence(
    layers: tuple[LayerCheck, ...], by_position: Mapping[tuple[int, Part], torch.Tensor], limits: Mapping[str, Limit]
) -> Divergence | None:
    """The first place in the order of computation that is beyond its limit; `by_position` has the largest error [S] at each."""
    for check in layers:
        places: tuple[tuple[Part, str, float | None], ...] = (
            ("attention", "attention", check.attention_error), ("ffn", "hidden state", check.hidden_error),
        )  # fmt: skip
        for part, name, error in places:
            limit = limits.get(f"{name} of layer {check.layer}")
            if limit is not None and error is not None and not error <= limit.value:
                beyond = (~(by_position[check.layer, part] <= limit.value)).nonzero()[:, 0].tolist()
                return Divergence(check.layer, part, error, limit.value, beyond[0] if beyond else None)
    return None


def _layer(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    found = result.first_divergence
    if found is None:
        return
    name = f"{'attention' if found.part == 'attention' else 'hidden state'} of layer {found.layer}"
    first = "" if found.first_position is None else f", from token {found.first_position} on"
    yield (
        "layer",
        (
            f"first divergence in layer {found.layer}, in {_describe_part(result, found)}: relative error "
            f"{_over(found.error, result.limits[name])}{first}{_describe_start(found)}"
        ),
    )


def _describe_part(result: ProviderParity, found: Divergence) -> str:
    if found.part == "attention":
        return "the output of attention"
    return "the hidden state, after a right attention" if f"attention of layer {found.layer}" in result.limits else "the hidden state"


def _describe_start(found: Divergence) -> str:
    """What the first wrong token says of attention: the first token reads itself alone, whatever positions and mask are."""
    if found.part != "attention" or not found.first_position:
        return ""
    if found.first_position == 1:
        return " (a token that reads itself alone is right: look at positions and rotary tables)"
    return f" (every token before {found.first_position} is right: look at the window and the mask of attention)"


def _logits(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    limit = result.limits.get("logits")
    if limit is None:
        return
    broken = [check for check in result.checks if not check.relative_error <= limit.value]
    pattern = describe_pattern(result.checks, broken)
    for check in broken:
        first = "" if check.first_position is None else f", from token {check.first_position} on"
        yield "logits", f"{check.name}: relative error {_over(check.relative_error, limit)}{first} ({pattern or _worst(result)})"
    free = result.free_run
    if free is not None and not free.largest_gap <= 2 * limit.value:  # each of two logits may be off by the limit
        yield (
            "logits",
            (
                f"greedy text differs after {free.shortest_prefix} of {free.num_tokens} tokens, where the reference's choice is ahead by "
                f"{free.largest_gap:.1e} > {2 * limit.value:.1e} of the largest logit ({pattern or _worst(result)})"
            ),
        )


def describe_pattern(checks: tuple[Check, ...], broken: list[Check]) -> str | None:
    """What the broken checks have in common that the right ones have not; None where that says nothing."""
    right = [check for check in checks if check not in broken]
    if not broken or not right:
        return None
    if all(check.padded for check in broken) and any(check.padded for check in checks):
        return "every row without padding is right: look at left padding, its mask and positions"
    if all(check.decoded for check in broken):
        return "every prefill is right: look at the KV cache and the positions of decoding"
    first = min(check.first_position or 0 for check in broken)
    if first > 1:
        return f"every token before {first} is right: look at the window and the mask of attention"
    return None


def _language(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    limits = result.limits
    if "kl" in limits and not result.twin.kl <= limits["kl"].value:
        yield "language", f"KL from the twin {result.twin.kl:.1e} > {limits['kl'].value:.0e} ({_worst(result)})"
    increase = result.perplexity / result.finetuned_perplexity - 1
    most = limits["perplexity"].value if "perplexity" in limits else math.inf
    if not increase <= most:
        yield "language", (f"perplexity {result.perplexity:.4f} is {increase:+.2%} of the fine-tuned model's; at most {most:+.2%} ({_worst(result)})")


def _task(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    for check in result.tasks:
        if isinstance(check, str):
            continue
        gap, drop = gap_limit(check.kind, result.limits), result.limits.get("score")
        if gap is not None and not check.largest_gap <= gap.value:
            other = "finds the texts otherwise alike" if check.kind == "similarity" else "answers otherwise"
            error = _over(check.largest_gap, gap)
            yield (
                "task",
                f"'{check.name}', example {check.example}: the twin {other}, by a relative error of {error} ({_worst(result)})",
            )
        if drop is not None and not -check.change - 2 * check.standard_error <= drop.value:
            yield (
                "task",
                (
                    f"'{check.name}': {check.metric} {check.package[check.metric]:.4f} is {-check.change:.4f} ± {check.standard_error:.4f} below the "
                    f"fine-tuned model's; at most {drop.value:g} and two standard errors ({_worst(result)})"
                ),
            )


def _routing(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    limit = result.limits.get("routing")
    least = min(result.twin.routing_agreement, default=1.0)
    if limit is not None and not least >= limit.value:
        yield "routing", f"routing agreement with the twin {least:.4f} < {limit.value} ({_worst(result)})"


def _worst(result: ProviderParity) -> str:
    n = result.worst_layer
    if n is None:
        return "the package shows nothing of its layers"
    routing = f"routing agreement {result.twin.routing_agreement[n]:.4f}, " if n < len(result.twin.routing_agreement) else ""
    return f"worst layer {n}: {routing}hidden error {result.twin.hidden_error[n]:.1e}"


def _over(error: float, limit: Limit) -> str:
    return f"{error:.1e} > {limit.value:.1e}"


def judge_tiers(breaches: list[tuple[Tier, str]], why_not: dict[Tier, str]) -> dict[Tier, str]:
    """What became of each tier: passed, broken, or why it was not run or not judged."""
    broken = {tier for tier, _ in breaches}
    return {tier: "broken" if tier in broken else why_not.get(tier, "passed") for tier in TIERS}
