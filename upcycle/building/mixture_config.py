"""The config of our own mixtures: dense fields, and where experts are."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from dense2moe.upcycle.building.config import UpcycleConfig
from dense2moe.upcycle.building.pieces import Site
from dense2moe.upcycle.checkpoints.mixture_classes import map_classes, register_mixture
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.gates.section import describe_gate
from dense2moe.upcycle.models.architecture import Conversion, read_field
from dense2moe.upcycle.models.host import HostStack
from dense2moe.upcycle.models.table import find_host


def make_mixture_config(
    checkpoint: Checkpoint,
    conversion: Conversion,
    config: UpcycleConfig,
    sites: tuple[Site, ...],
    widths: tuple[int, ...],
) -> PreTrainedConfig:
    """All fields of the dense config, and a section `mixture`.

    Under a model type of its own. `mixture.py` says what the section holds.
    """
    source, target = checkpoint.config, conversion.target
    host = find_host(target.model_type)
    assert host is not None, f"{target.model_type} is no mixture of ours"
    described = []
    stacks = host.list_stacks(conversion.family.architecture)
    for number, (stack, width) in enumerate(zip(stacks, widths, strict=True)):
        layers = [site.layer for site in sites if site.stack == number]
        if layers:
            described.append(_describe_site(checkpoint, conversion, number, stack, layers, config, width))
    fields = {name: value for name, value in source.to_dict().items() if name not in ("model_type", "auto_map")}
    fields["mixture"] = {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        **({"gate": gate} if (gate := describe_gate(config.make_gate())) else {}),
        **(
            {}
            if config.router.form == "linear"
            else {"router": {"form": config.router.form, "size": config.router.size}}
        ),
        "oldest_transformers": host.oldest_transformers,
        "sites": described,
    }
    made: PreTrainedConfig = register_mixture(target.model_type)(**fields)
    made.architectures = [target.architecture]
    made.dtype = source.dtype
    made.auto_map = map_classes(type(source))
    if getattr(made, "tokenizer_class", None) is None and (name := _tokenizer_class(source.model_type)) is not None:
        made.tokenizer_class = name  # transformers finds it by the model type otherwise, and does not know ours
    return made


def _tokenizer_class(model_type: str) -> str | None:
    name = TOKENIZER_MAPPING_NAMES.get(model_type)
    return name if name is not None and tokenizer_class_from_name(name) is not None else None


def _describe_site(
    checkpoint: Checkpoint,
    conversion: Conversion,
    number: int,
    stack: HostStack,
    layers: list[int],
    config: UpcycleConfig,
    width: int,
) -> dict[str, Any]:
    """One entry of the section's `sites`."""
    parts, entries = conversion.family.stacks[number].parts, checkpoint.entries
    up = parts["ffn_up"]
    shape = entries[up.name.format(layer=layers[0])].shape
    is_shared = config.shared_expert != "none"
    return {
        "ffn": stack.name(stack.ffn),
        "passed": [stack.name(module) for module in stack.passed],
        "layers": layers,
        "hidden_size": shape[0] if up.transposed else shape[1],
        "intermediate_size": width,
        "activation": stack.activation_name or read_field(checkpoint.config, stack.activation),
        "gated": stack.is_gated,
        "up_bias": parts["ffn_up_bias"].name.format(layer=layers[0]) in entries,
        "down_bias": parts["ffn_down_bias"].name.format(layer=layers[0]) in entries,
        "inner_dropout": _dropout(checkpoint.config, stack.inner_dropout),
        "dropout": _dropout(checkpoint.config, stack.dropout),
        "rates": [stack.name(rate) for rate in stack.rates],
        "shared_size": width * config.num_parts if is_shared else 0,
    }


def _dropout(config: Any, field: str | None) -> float:
    return 0.0 if field is None else float(read_field(config, field) or 0.0)
