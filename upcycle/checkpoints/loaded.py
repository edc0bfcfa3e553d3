"""A model loaded for its task, and the routers in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.class_heads import has_head
from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.checkpoints.loading import load_whole
from dense2moe.upcycle.checkpoints.mixture_classes import find_class, is_own
from dense2moe.upcycle.checkpoints.new_head import load_headed
from dense2moe.upcycle.checkpoints.reader import read_config
from dense2moe.upcycle.models.table import find_hosted
from dense2moe.upcycle.tasks.head import LabelHead
from dense2moe.upcycle.tasks.model_class import find_model_class

SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")
"""What transformers' modules call a selection bias."""


def load_model(
    directory: Path, dtype: torch.dtype, task: str = "text-generation", head: LabelHead | None = None
) -> PreTrainedModel:
    """Load a model by transformers alone, whole or not at all.

    `task` names the head as Hugging Face names tasks. A `head` that the checkpoint has not is drawn.

    Raises:
        UpcycleError: weights are missing, left over or of another shape, or the checkpoint is damaged; see
            `load_whole`.
    """
    if head is None or has_head(read_config(directory), task, head):
        model = load_whole(find_loader(directory, task), directory, dtype)
        if head is not None:
            model.config.problem_type = cast(Any, head.problem_type)  # of the data; many checkpoints name none
    else:
        model = load_headed(directory, dtype, task, head)
    own = is_own(model.config.model_type)
    if next(router_weights(model), None) is not None and (own or not model.config.is_encoder_decoder):
        # The default, grouped_mm, refuses bfloat16 experts whose rows are no multiple of 16 bytes; eager takes every
        # width.
        model.set_experts_implementation("eager")
    return cast(PreTrainedModel, model)


def find_loader(directory: Path, task: str) -> Any:
    """The class that a checkpoint is loaded by.

    Hosts have several for a task: the one that the checkpoint names is taken.
    """
    hosted = find_hosted(read_config(directory))
    return find_model_class(task) if hosted is None else find_class(hosted)


def router_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Each layer's router, in order: module `gate` or `router` beside experts."""
    for _, router in _sparse_modules(model):
        yield router


def _sparse_modules(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Each module that has experts and a router, and its router."""
    for module in model.modules():
        if (
            hasattr(module, "experts")
            and (router := getattr(module, "gate", None) or getattr(module, "router", None)) is not None
        ):
            yield module, cast(torch.nn.Module, router)


def sparse_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The numbers of a model's layers that have experts."""
    layers = enumerate(find_layers(model))
    return tuple(number for number, layer in layers if next(router_modules(layer), None) is not None)


def router_weights(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The router weight [num_experts, hidden] of each layer, in order."""
    for router in router_modules(model):
        yield next(parameter for name, parameter in router.named_parameters() if name.endswith("weight"))


def router_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """All matrices of each layer's router, in order."""
    for router in router_modules(model):
        yield from (parameter for parameter in router.parameters() if parameter.ndim == 2)


def selection_biases(model: torch.nn.Module) -> Iterator[torch.Tensor | None]:
    """Each layer's selection bias, float32 [num_experts]; None without one.

    Layers come in order. It is the model's own memory, so that what is written there is the model's.
    """
    for layer, router in _sparse_modules(model):
        inside = (*router.named_parameters(), *router.named_buffers(), *layer.named_buffers(recurse=False))
        bias = next((tensor for name, tensor in inside if name.rpartition(".")[2] in SELECTION_BIASES), None)
        yield bias if bias is None or bias.ndim == 1 else bias.detach().view(-1)


def count_experts(model: torch.nn.Module) -> int:
    """How many experts a layer has; 0 of a dense model."""
    first = next(router_weights(model), None)
    return 0 if first is None else first.shape[0]
