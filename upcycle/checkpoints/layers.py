"""The layers of a model that is loaded, or empty."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.models.host import CLASS_PREFIX
from dense2moe.upcycle.models.mixture import find_base
from dense2moe.upcycle.models.table import find_host

_NUMBER = "{layer}"


def leave_out_absent(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Take out what a checkpoint lacks and may, such as a pooler."""
    host = find_host(model.config.model_type)
    for pattern in host.find_absent(type(model).__name__, names) if host is not None else ():
        module = pattern.partition(".")[0]
        if getattr(model, module, None) is not None:
            setattr(model, module, None)


def find_layers(model: PreTrainedModel) -> tuple[torch.nn.Module, ...]:
    """The layers of a decoder, or all of a host."""
    return tuple(itertools.chain(*find_stacks(model)))


def find_stacks(model: PreTrainedModel) -> tuple[tuple[torch.nn.Module, ...], ...]:
    """The layers of a decoder, or of a host's parts.

    Of an encoder and a decoder, say; a part without layers is none.
    """
    return _find(model, lambda layer: layer)


def find_blocks(model: PreTrainedModel) -> tuple[tuple[torch.nn.Module, ...], ...]:
    """The modules that follow each other, with a layer in each.

    They are the layers themselves, but for T5's, which are what a block ends with.
    """
    return _find(model, lambda layer: layer[: layer.index(_NUMBER) + len(_NUMBER)])


def _find(model: PreTrainedModel, name: Callable[[str], str]) -> tuple[tuple[torch.nn.Module, ...], ...]:
    host = find_host(model.config.model_type)
    if host is None:
        return (tuple(cast(torch.nn.ModuleList, model.get_decoder().layers)),)
    found = [
        tuple(
            find_base(model, stack.layer).get_submodule(name(stack.layer).format(layer=number))
            for number in range(stack.count_layers(model.config))
        )
        for stack in host.list_stacks(type(model).__name__.removeprefix(CLASS_PREFIX))
    ]
    return tuple(dict.fromkeys(layers for layers in found if layers))  # a layer may have two FFNs
