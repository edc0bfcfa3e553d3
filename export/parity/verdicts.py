"""Verdicts: a line for every broken limit, naming tier and place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dense2moe.export.parity.advice import advise
from dense2moe.export.parity.limits import gap_limit
from dense2moe.export.parity.place import OUTSIDE, OWN_INPUT, PlacePart, name_place
from dense2moe.export.parity.records import TIERS, Check, Limit, PlaceCheck, ProviderParity, TaskCheck, Tier
from dense2moe.upcycle.tasks.figure import Figure

NO_TWIN = "no checkpoint with the package's own weights was given"
MOST_TIES = 0.1
"""Of all tokens: where routers tie in more, every operator has an order of its own.

And two right packages write other texts.
"""
_FACTOR_SHARE = 0.5  # of an error: a factor that makes so much of it explains it


def find_breaches(result: ProviderParity) -> list[tuple[Tier, str]]:
    """Every broken limit, tier by tier; figures without limits are skipped."""
    tiers = (_weights, _operator, _layer, _logits, _language, _task, _routing, _files)
    return [breach for tier in tiers for breach in tier(result)]


def _weights(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    check = result.weights
    if isinstance(check, str) or not check.num_wrong:
        return
    for wrong in check.wrong:
        yield "weights", str(wrong)
    if (more := check.num_wrong - sum(wrong.count for wrong in check.wrong)) > 0:
        yield "weights", f"{more:,} more rows of {check.num_rows:,} differ from the twin's"


def _files(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    if not isinstance(result.files, str):
        yield from (("files", difference) for difference in result.files.differences)


def _operator(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    """Broken limits of routers and experts, by layer."""
    if isinstance(result.places, str):
        return
    for check in result.places:
        if check.is_right or check.part not in ("router", "experts"):
            continue
        what = "router logits" if check.part == "router" else _wrong_experts(check)
        error = f"relative error {_beyond(check)}{_describe_factor(check)}"
        yield (
            "operator",
            f"layer {check.layer}, {what} on the graph's own input: {error} ({advise(check, result.weights)})",
        )


def _wrong_experts(check: PlaceCheck) -> str:
    if check.factors is not None and len(check.experts) != 1:
        least, largest = check.factors
        return (
            f"experts, each token's output a multiple of the twin's, {least:.2f} to {largest:.2f} times (are the "
            "weights renormalized?),"
        )
    match check.experts:
        case ():
            return "experts, none of them in every token,"
        case (expert,):
            return f"expert {expert}"
        case _:
            return f"experts {', '.join(map(str, check.experts))}"


def _layer(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    """Broken limits of layers: the first place of each kind.

    In the order of computation, that is not what the twin computes from the same input.
    """
    if isinstance(result.places, str):
        return
    wrong: dict[PlacePart, list[PlaceCheck]] = {}
    for check in result.places:
        if not check.is_right and check.part not in ("router", "experts"):
            wrong.setdefault(check.part, []).append(check)
    for part, checks in wrong.items():
        first = checks[0]
        where = name_place(first.layer, part)
        begins = "" if not first.first_position else f", from token {first.first_position} on"
        others = "" if len(checks) == 1 else f"; and in {len(checks) - 1} more layers"
        error = f"relative error {_beyond(first)}{_describe_factor(first)}"
        yield "layer", f"{where}{OWN_INPUT}: {error}{begins}{others} ({advise(first, result.weights)})"


def _describe_factor(check: PlaceCheck) -> str:
    """A factor that explains the error."""
    return f", {check.factor:.5g} times the twin's" if abs(check.factor - 1) > _FACTOR_SHARE * check.error else ""


def _beyond(check: PlaceCheck) -> str:
    if check.error <= check.limit and check.factor_limit is not None:
        return f"common to all tokens {abs(check.factor - 1):.1e} > {check.factor_limit:.1e}"
    return f"{check.error:.1e} > {check.limit:.1e}"


def _logits(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    limits = result.limits
    limit = limits.get("logits")
    if limit is None:
        return
    told = (
        set()
        if isinstance(result.places, str)
        else {name_place(place.layer, place.part) for place in result.places if not place.is_right}
    )
    broken = [check for check in result.checks if check.place is not None or not check.relative_error <= limit.value]
    broken = [check for check in broken if check.place is None or check.place.partition(OWN_INPUT)[0] not in told]
    patterns = [describe_pattern(check, result.checks, broken, _is_elsewhere(result)) for check in broken]
    for check, pattern in zip(broken, patterns, strict=True):
        first = "" if check.first_position is None else f", from token {check.first_position} on"
        error = f"relative error {_over(check.relative_error, limit)}" if check.place is None else check.place
        aside = pattern or (_worst(result) if check.place is None else "")
        yield "logits", f"{check.name}: {error}{first}{f' ({aside})' if aside else ''}"
    factor = limits.get("factor")
    if factor is not None and result.logits_factor is not None and not abs(result.logits_factor - 1) <= factor.value:
        yield (
            "logits",
            f"logits are {result.logits_factor:.5g} times the twin's; the factor may differ from 1 by "
            f"{factor.value:.1e} at most",
        )
    free = result.free_run
    # else its text may part from the reference's at any token
    follows = result.tie_share <= MOST_TIES and not isinstance(result.weights, str)
    # each of two logits may be off by the limit
    if free is not None and follows and not free.largest_gap <= 2 * limit.value:
        yield (
            "logits",
            (
                f"greedy text differs after {free.shortest_prefix} of {free.num_tokens} tokens, where the "
                "reference's choice is ahead by "
                f"{free.largest_gap:.1e} > {2 * limit.value:.1e} of the largest logit "
                f"({next(iter(patterns), None) or _worst(result)})"
            ),
        )


def _is_elsewhere(result: ProviderParity) -> bool:
    """Whether a fault was found that no position explains.

    Tokens that do not meet it, such as those of other experts, are right by chance alone.
    """
    places = () if isinstance(result.places, str) else result.places
    wrong = any(not place.is_right and place.part not in ("attention", "cache") for place in places)
    return wrong or (not isinstance(result.weights, str) and bool(result.weights.num_wrong))


def describe_pattern(
    check: Check, checks: Sequence[Check], broken: Sequence[Check], is_elsewhere: bool = False
) -> str | None:
    """Advice on a broken check, from checks that are right there.

    A row that is wrong only further on is right there. None where nothing is known, or the fault is known to lie
    elsewhere.
    """
    if is_elsewhere:
        return None
    first = check.first_position or 0

    def are_right(others: list[Check]) -> str | None:
        """How right they are, in words."""
        wrong = [each for each in others if each in broken]
        if not others or any((each.first_position or 0) <= first for each in wrong):
            return None
        return f"right before token {min(each.first_position or 0 for each in wrong)}" if wrong else "right"

    plain = [each for each in checks if not each.padded]
    if check.padded and (right := are_right(plain)):
        return f"every row without padding is {right}: look at left padding, its mask and positions"
    if check.decoded and (right := are_right([each for each in plain if not each.decoded])):
        return f"every prefill is {right}: look at the KV cache and the positions of decoding"
    if first > 1 and len(broken) < len(checks):
        cached = check.place is not None and name_place(0, "cache").partition(", ")[2] in check.place
        what = "positions and rotary tables" if cached else "the window and the mask of attention"
        return f"every token before {first} is right: look at {what}"
    return None


def _language(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    limits = result.limits
    if "kl" in limits and not result.twin.kl <= limits["kl"].value:
        yield "language", f"KL from the twin {result.twin.kl:.1e} > {limits['kl'].value:.0e} ({_worst(result)})"
    if result.figures:
        yield from _first_figure(result, result.figures[0], result.finetuned_figures[0])


def _first_figure(result: ProviderParity, found: Figure, tuned: Figure) -> Iterator[tuple[Tier, str]]:
    """The first figure against the fine-tuned model's; NaN breaks limits."""
    change = found.value / tuned.value - 1 if tuned.value else found.value
    sign = 1 if found.better == "lower" else -1
    most = result.limits[found.name].value if found.name in result.limits else math.inf
    if not sign * change - 2 * result.figures_error <= most:
        text = f"{found.name} {found.value:.4f} is {change:+.2%} ± {result.figures_error:.2%} of the fine-tuned model's"
        bound = "at most" if sign > 0 else "at least"
        yield "language", f"{text}; {bound} {sign * most:+.2%} and two standard errors ({_worst(result)})"


def _task(result: ProviderParity) -> Iterator[tuple[Tier, str]]:
    for check in result.tasks:
        if isinstance(check, str):
            continue
        gap, drop = gap_limit(check.kind, result.limits), result.limits.get("score")
        if gap is not None and not check.largest_gap <= gap.value:
            other = "gives another similarity" if check.kind == "similarity" else "answers otherwise"
            error = _over(check.largest_gap, gap)
            yield (
                "task",
                f"'{check.name}', example {check.example}: the twin {other}, by a relative error of {error} "
                f"({_worst(result)})",
            )
        if drop is not None and not -check.change - 2 * check.standard_error <= drop.value:
            yield (
                "task",
                (
                    f"'{check.name}': {check.metric} {check.package[check.metric]:.4f} is {-check.change:.4f} ± "
                    f"{check.standard_error:.4f} below the "
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
    routing = (
        f"routing agreement {result.twin.routing_agreement[n]:.4f}, " if n < len(result.twin.routing_agreement) else ""
    )
    return f"worst layer {n}: {routing}hidden error {result.twin.hidden_error[n]:.1e}"


def _over(error: float, limit: Limit) -> str:
    return f"{error:.1e} > {limit.value:.1e}"


def judge_tiers(breaches: list[tuple[Tier, str]], why_not: dict[Tier, str]) -> dict[Tier, str]:
    """Each tier's outcome: passed, broken, or why it was not judged."""
    broken = {tier for tier, _ in breaches}
    return {tier: "broken" if tier in broken else why_not.get(tier, "passed") for tier in TIERS}


def explain_unjudged(result: ProviderParity, exact_twin: bool, unknown: Sequence[str]) -> dict[Tier, str]:
    """Why a tier without a broken limit did not simply pass.

    `unknown`: products and others whose rounding of their inputs is not known here, in words.
    """
    reasons: dict[Tier, str] = {}
    if not isinstance(result.weights, str) and (lost := result.weights.not_judged):
        reasons["weights"] = f"passed, except {len(lost)} tensors whose rows were not found: {lost[0]} and others"
    if not exact_twin:
        reasons = dict.fromkeys(("weights", "operator", "layer", "routing"), f"not judged: {NO_TWIN}")
        reasons["logits"] = f"passed: each way of feeding it against itself; not judged against torch: {NO_TWIN}"
    elif isinstance(result.places, str):
        reasons = {"operator": result.places, "layer": result.places}
    elif not any(check.part == "experts" for check in result.places):
        reasons["operator"] = "not run: the package shows no layers of experts"
    elif not any(check.layer != OUTSIDE for check in result.places):
        reasons["layer"] = "not run: the package shows nothing of its layers"
    if unknown:
        why = f"the twin cannot round as the graph does: {'; '.join(unknown)}"
        reasons |= dict.fromkeys(("operator", "layer", "routing"), f"not judged: {why}")
        reasons["logits"] = f"passed: each way of feeding it against itself; not judged against torch: {why}"
    if result.tie_share > MOST_TIES:
        reasons["routing"] = f"not judged: the routers tie in {result.tie_share:.0%} of all tokens"
    if not result.twin.routing_agreement:
        reasons["routing"] = "not run: the package shows no router logits"
    if not any(isinstance(check, TaskCheck) for check in result.tasks):
        reasons["task"] = next(
            (check for check in result.tasks if isinstance(check, str)), "not run: no task was given"
        )
    return reasons
