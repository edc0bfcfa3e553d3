"""The choice of a target, and why others cannot hold the model."""

from __future__ import annotations

from typing import Any

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.gates.section import describe_gate
from dense2moe.upcycle.models.architecture import Architecture, Conversion, find_interval
from dense2moe.upcycle.models.table import find_family, list_conversions


def choose_conversion(source: Any, config: UpcycleConfig, where: str) -> Conversion:
    """The first conversion that fits, or the one asked for.

    `where` names the config in a refusal.

    Raises:
        UpcycleError: none does; the reasons are those of the target that comes nearest, the one with the fewest. A
            layer is not in the source.
    """
    family = find_family(source.model_type, source.architectures, where, source)
    rows = list_conversions(family)
    if config.target != "auto":
        asked = [row for row in rows if row.target_name == config.target]
        if not asked:
            names = ", ".join(row.target_name for row in rows)
            raise UpcycleError(f"{where}: upcycle.target is {config.target}; {family.architecture} can become {names}")
        rows = asked
    else:
        rows = [row for row in rows if not row.by_name_alone]
    refused = [(row, find_refusals(row, source, config)) for row in rows]
    fitting = next((row for row, reasons in refused if not reasons), None)
    if fitting is not None:
        return fitting
    nearest, reasons = min(refused, key=lambda pair: len(pair[1]))
    others = f" (the nearest target is {nearest.target_name})" if len(rows) > 1 else ""
    mend = "; upcycle.target mixture would hold it" if _holds_as_mixture(family, source, config) else ""
    raise UpcycleError(f"{where}: {'; '.join(reasons)}{others}{mend}")


def _holds_as_mixture(family: Architecture, source: Any, config: UpcycleConfig) -> bool:
    """Whether a mixture of ours would hold a model."""
    own = next((row for row in list_conversions(family) if row.keeps_rest), None)
    return config.target != "mixture" and own is not None and not find_refusals(own, source, config)


def find_refusals(conversion: Conversion, source: Any, config: UpcycleConfig) -> list[str]:
    """Why a target cannot hold the source with these settings.

    One reason each; empty where it can.
    """
    architecture = conversion.target.architecture
    reasons = [
        f"{name} is {value}; {architecture} needs {required.value}: {required.reason}"
        for name, required in conversion.required.items()
        if (value := getattr(source, name, required.value)) != required.value
    ]
    reasons += [condition.refusal(source) for condition in conversion.conditions if not condition.holds(source)]
    if config.router.reads_text and conversion.family.ffn_module is None:
        why = "it is exact with a zero router alone" if conversion.experts.top_1 else "its layers are not run alone"
        reasons.append(f"upcycle.router.kind is {config.router.kind}; {architecture} needs normal: {why}")
    if config.merging.method == "greedy-soup" and conversion.family.task != "text-generation":
        reasons.append(
            f"upcycle.merging.method is greedy-soup; {architecture} needs another: it has no loss of "
            "the next token to be measured"
        )
    counts = [(stack.count_layers(source), stack.when) for stack in conversion.family.stacks]
    depths = [depth for depth, when in counts if depth or when is None]
    return reasons + _find_setting_refusals(conversion, config, depths)


def _find_setting_refusals(conversion: Conversion, config: UpcycleConfig, depths: list[int]) -> list[str]:
    """Settings that the target cannot express, one reason each.

    `depths` are the numbers of layers in each stack of the source.
    """
    target, experts, reasons = conversion.target, conversion.experts, []
    if config.router.form != "linear" and not conversion.keeps_rest:
        reasons.append(
            f"upcycle.router.form is {config.router.form}; {target.architecture} has linear routers, and 'mixture' any"
        )
    if describe_gate(config.make_gate()) and not conversion.keeps_rest:
        reasons.append(f"upcycle.gate is given; {target.architecture} has a gate of its own, and 'mixture' any")
    if experts.partial_layers == "none" and any(len(resolve_layers(config.layers, depth)) < depth for depth in depths):
        reasons.append(
            f"upcycle.layers is {_shown(config.layers)}; {target.architecture} needs all: it has experts in every layer"
        )
    if experts.partial_layers == "last" and any(
        resolve_layers(config.layers, depth)[0] + len(resolve_layers(config.layers, depth)) < depth for depth in depths
    ):
        reasons.append(
            f"upcycle.layers is {_shown(config.layers)}; {target.architecture} needs layers up to the last: it has "
            "dense ones before them alone"
        )
    if experts.partial_layers == "interval" and any(
        find_interval(resolve_layers(config.layers, depth)) is None for depth in depths
    ):
        reasons.append(
            f"upcycle.layers is {_shown(config.layers)}; {target.architecture} needs layers in a row, or every-N: it "
            "counts from a first layer to a last one"
        )
    if config.num_experts < experts.min_experts:
        reasons.append(
            f"upcycle.num_experts is {config.num_experts}; {target.architecture} needs at least "
            f"{experts.min_experts}, which its gate compares"
        )
    if config.shared_expert != "none" and experts.shared is None:
        reasons.append(
            f"upcycle.shared_expert is {config.shared_expert}; {target.architecture} needs none: it has no shared "
            "expert"
        )
    if experts.shared is not None and experts.shared.width_field is None:
        if config.shared_expert == "none":
            reasons.append(
                f"upcycle.shared_expert is none; {target.architecture} needs half or zero: it always has a shared "
                "expert"
            )
        if config.num_parts > 1:
            reasons.append(
                f"upcycle.experts.kind is {config.experts.kind}; {target.architecture} needs copies: its shared "
                "expert, which is the whole FFN, is as wide as the others"
            )
    if experts.top_1 and config.num_experts_per_tok != 1:
        k = config.num_experts_per_tok
        reasons.append(
            f"upcycle.num_experts_per_tok is {k}; {target.architecture} needs 1: each token visits one expert"
        )
    if experts.top_1 and config.experts.kind != "copies":
        kind = config.experts.kind
        reasons.append(
            f"upcycle.experts.kind is {kind}; {target.architecture} needs copies: one expert a token must be the "
            "whole FFN"
        )
    return reasons


def resolve_layers(layers: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The numbers of the layers that get experts.

    Raises:
        UpcycleError: a number is beyond the last layer, or none is left.
    """
    match layers:
        case "all":
            return tuple(range(num_layers))
        case "last-half":
            return tuple(range(num_layers // 2, num_layers))
        case str():
            step = int(layers.removeprefix("every-"))
            chosen = tuple(range(step - 1, num_layers, step))
        case _:
            chosen = tuple(sorted(layers))
    if not chosen or chosen[-1] >= num_layers:
        named = layers if isinstance(layers, str) else f"layer {chosen[-1]}"
        raise UpcycleError(
            f"upcycle.layers: {named} is not in a model of {num_layers} layers; must be of 0 to {num_layers - 1}"
        )
    return chosen


def _shown(layers: str | tuple[int, ...]) -> str:
    return layers if isinstance(layers, str) else str(list(layers))
