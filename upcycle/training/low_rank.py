"""Low-rank updates by peft: added, computed with, merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.memory import give_heap_back
from dense2moe.upcycle.training.expert_forward import LOW_RANK


def add_low_rank(model: PreTrainedModel, matrices: Collection[str], rank: int, alpha: int) -> Callable[[bool], None]:
    """Give matrices low-rank updates by peft; returns how to end them.

    The returned function merges the updates into the weights or takes them off. Each update is multiplied by alpha /
    rank (Hu et al. 2021). Experts are parameters of three dimensions and no linear layers, which peft leaves out unless
    they are named. peft is given the list of layers and not the model: of a model of transformers it rewrites targets
    that end as the experts of an older version did, so that linear layers called `gate_proj` lose their updates and
    experts get two ranks in one (peft 0.21, `_convert_peft_config_moe`).
    """
    import peft  # slow to import, and only this needs it

    layers: Any = nn.ModuleList(find_layers(model))
    names = {id(parameter): name for name, parameter in layers.named_parameters()}
    wanted = {name: names[id(parameter)] for name, parameter in model.named_parameters() if name in matrices}
    stacked = sorted(inner for name, inner in wanted.items() if not name.endswith(".weight"))
    linear = sorted(inner.removesuffix(".weight") for name, inner in wanted.items() if name.endswith(".weight"))
    kept = {id(parameter) for parameter in layers.parameters() if parameter.requires_grad}
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, target_parameters=stacked or None)
    adapted = peft.LoraModel(layers, config, "default")
    for parameter in layers.parameters():
        if id(parameter) in kept:  # peft has frozen all but its own
            parameter.requires_grad_(True)

    def finish(learned: bool) -> None:
        if learned:
            adapted.merge_and_unload()
        else:
            adapted.unload()

    return finish


def read_updates(model: PreTrainedModel, names: Mapping[int, str]) -> tuple[dict[str, Any], set[int]]:
    """Each matrix's low-rank update: shapes of both factors, and scale.

    The factors are peft's.

    Also the identities of the factors that learn.
    """
    updates: dict[str, Any] = {}
    adapters: set[int] = set()
    for module in model.modules():
        if (factors := getattr(module, "lora_A", None)) is None:
            continue
        layer: Any = module
        matrix = layer.get_param() if hasattr(layer, "parameter_name") else layer.base_layer.weight
        for adapter in factors:
            pair = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
            shapes = tuple(tuple(factor.shape) if factor.requires_grad else () for factor in pair)
            updates[names.get(id(matrix), "an unknown matrix")] = (*shapes, layer.scaling[adapter])
            adapters |= {id(factor) for factor in pair}
    return updates, adapters


def use_low_rank(model: nn.Module) -> None:
    """Let stacked experts compute with their low-rank factors.

    peft adds the factors. peft itself makes a sum as large as all experts of a layer, in the dtype of the frozen ones,
    where a small update is lost.
    """
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "parameter_name"):
            wrapper: Any = module
            experts = wrapper.get_base_layer()
            experts.__dict__.setdefault(LOW_RANK, {})[wrapper.parameter_name] = partial(_factors, wrapper)
            wrapper.forward = partial(_pass_on, wrapper)


def _factors(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Low-rank factors of a stack as peft stores them, and their scale.

    [experts, rank, in] and [experts, out, rank] of a stack [experts, out, in].
    """
    (adapter,) = wrapper.lora_A
    first, second = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    num_experts, rows, columns = wrapper.get_param().shape
    assert (first.shape[1], second.shape[0]) == (columns, rows)
    return (
        first.reshape(num_experts, -1, columns),
        second.reshape(rows, -1, num_experts).permute(2, 0, 1),
        wrapper.scaling[adapter],
    )


def _pass_on(wrapper: Any, *arguments: Any, **keywords: Any) -> Any:
    return wrapper.base_layer(*arguments, **keywords)


def merge_low_rank(model: nn.Module, dtype: torch.dtype) -> None:
    """Add every low-rank update to its matrix, and round to `dtype`.

    Sums are in float32, one matrix after the other.
    """
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            base = layer.get_base_layer()
            base.__dict__.pop(LOW_RANK, None)
            matrix = layer.get_param() if hasattr(layer, "parameter_name") else base.weight
            matrix.data = matrix.data.to(torch.float32)
            (adapter,) = layer.lora_A
            matrix.data = (matrix.data + layer.get_delta_weight(adapter).detach()).to(dtype)
            layer.lora_B[adapter].weight.data.zero_()  # what is left for peft to merge
            give_heap_back()
