"""The config of the mixture: fields carried, derived or set."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.mixture_config import make_mixture_config
from dense2moe.upcycle.building.pieces import Site
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.errors import UpcycleError, shorten
from dense2moe.upcycle.models.architecture import Architecture, Conversion
from dense2moe.upcycle.models.table import GENERIC_FIELDS


def make_target_config(
    checkpoint: Checkpoint,
    conversion: Conversion,
    config: UpcycleConfig,
    sites: tuple[Site, ...],
    widths: tuple[int, ...],
) -> PreTrainedConfig:
    """Carry the config over from the *loaded* object.

    The two architectures' defaults differ, so absent json keys must not stay absent.
    """
    if conversion.keeps_rest:
        return make_mixture_config(checkpoint, conversion, config, sites, widths)
    source, target, experts, width = checkpoint.config, conversion.target, conversion.experts, widths[0]
    fields = _carry_fields(source, conversion) | dict(experts.fixed)
    fields[experts.count_field] = config.num_experts
    if experts.top_k_field:
        fields[experts.top_k_field] = config.num_experts_per_tok
    fields[experts.width_field] = width
    fields |= conversion.derived(source)
    fields |= _layer_fields(checkpoint, conversion, sites, width * config.num_parts)
    if experts.shared is not None and experts.shared.width_field is not None:
        whole = config.num_parts if experts.shared.in_experts else width * config.num_parts
        fields[experts.shared.width_field] = 0 if config.shared_expert == "none" else whole
    made = _make_config(target, fields, str(checkpoint.directory / "config.json"))
    made.architectures = [target.architecture]
    made.dtype = source.dtype
    return made


def derive_fields(source: PreTrainedConfig, conversion: Conversion, where: str) -> dict[str, Any]:
    """Fields of the target that follow from a source alone.

    Their values are as the target's class of config has them.

    Raises:
        UpcycleError: the target refuses their values.
    """
    fields = _carry_fields(source, conversion) | conversion.derived(source)
    made = _make_config(conversion.target, fields, where)
    return {name: getattr(made, name) for name in fields}


def _carry_fields(source: PreTrainedConfig, conversion: Conversion) -> dict[str, Any]:
    undeclared = (*conversion.optional, *GENERIC_FIELDS)
    optional = [name for name in undeclared if getattr(source, name, None) is not None]
    return {name: getattr(source, name) for name in (*conversion.carried, *optional)}


def _make_config(target: Architecture, fields: dict[str, Any], where: str) -> PreTrainedConfig:
    try:
        made: PreTrainedConfig = AutoConfig.for_model(target.model_type, **fields)
    except (
        Exception
    ) as error:  # the target's own validation: transformers raises strict dataclass errors of several kinds
        raise UpcycleError(f"{where}: {target.architecture} refuses these values: {shorten(error)}") from error
    return made


def _layer_fields(
    checkpoint: Checkpoint, conversion: Conversion, sites: tuple[Site, ...], ffn_width: int
) -> dict[str, Any]:
    """Fields about sparse layers, and about the width of others."""
    source, experts = checkpoint.config, conversion.experts
    match experts.partial_layers:
        case "none" | "any":
            return {}
        case "step":
            # Layers 1, 1 + step, …, or all for step 1, where step = layers // sparse layers (its config class, 5.23).
            fields = {}
            for stack, (name, count) in enumerate(
                (("encoder", source.num_layers), ("decoder", source.num_decoder_layers))
            ):
                chosen = [site.layer for site in sites if site.stack == stack]
                step = count // len(chosen)
                if chosen != [n for n in range(count) if step == 1 or n % step == 1]:
                    raise UpcycleError(
                        f"upcycle.layers: {conversion.target.architecture} cannot have experts in the {name}'s layers "
                        f"{chosen} alone; use all or every-2"
                    )
                fields[f"num_sparse_{name}_layers"] = len(chosen)
            return fields
        case _:
            named = experts.name_layers([site.layer for site in sites], source.num_hidden_layers)
            return {**named, experts.dense_width_field: ffn_width}
