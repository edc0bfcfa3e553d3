"""Parameters of any transformers decoder: classes, and rows on disk.

A checkpoint's names are not always the model's: experts lie one by one and are stacked at loading, modules have been
renamed. transformers keeps that mapping as rules which it can also run backwards, to save a model. So the model is
built without values and "saved": every parameter goes in as the numbers of its rows, and the tensors that come out say
which rows of which parameter they are made of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from dense2moe.export.coverage import find_other_kind
from dense2moe.export.errors import ExportError
from dense2moe.upcycle.checkpoints.layers import leave_out_absent
from dense2moe.upcycle.checkpoints.mixture_classes import is_own
from dense2moe.upcycle.models.host import Host
from dense2moe.upcycle.models.mixture import find_class
from dense2moe.upcycle.models.parts import TensorClass
from dense2moe.upcycle.models.table import find_host

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of the tensor `name`.

    All its dimensions but the last count as one, and a vector's rows are its elements.
    """

    name: str
    start: int
    stop: int


def empty_model(config: PreTrainedConfig, names: Iterable[str] | None = None) -> PreTrainedModel:
    """A config's model: parameters without values, buffers with them.

    `names` are those of a checkpoint's tensors, where the model is to have no more than that.

    Raises:
        ExportError: transformers has no decoder of this config, or it is of another kind of model; and it is no mixture
            of ours.
    """
    if not is_own(config.model_type):
        if (refusal := find_other_kind(config)) is not None:
            raise ExportError(refusal)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ExportError(
                f"config.json: model_type {config.model_type} has no decoder in transformers (AutoModelForCausalLM)"
            )
    with init_empty_weights(include_buffers=False):
        if is_own(config.model_type):
            assert config.architectures, "a mixture of ours names its class"
            model = find_class(config.architectures[0])(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()  # without values every module got a parameter of its own
    if names is not None:
        leave_out_absent(model, names)
    model.eval()
    return model


def find_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module of token embeddings, where there is one."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def has_tied_head(config: PreTrainedConfig) -> bool:
    """Whether a head multiplies by the embedding's table.

    A model of ours may have no such head, whatever its config says.
    """
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return tied and (not is_own(config.model_type) or empty_model(config).get_output_embeddings() is not None)


def find_transposed(config: PreTrainedConfig) -> frozenset[str]:
    """Matrices of our own mixtures that lie [in, out], as Conv1D's do.

    Integers share scales along what a matrix reads, so these stay floats.
    """
    if not is_own(config.model_type):
        return frozenset()
    modules = empty_model(config).named_modules()
    return frozenset(f"{name}.weight" for name, module in modules if type(module) is Conv1D)


def norms_add_one(config: PreTrainedConfig) -> bool:
    """Whether a host's norms multiply by one plus their weights."""
    return any(stack.norm_adds_one for host in _own_host(config) for stack in host.stacks)


def find_unread(config: PreTrainedConfig) -> Callable[[str], bool]:
    """Whether a graph may do without a host's tensor, by its name.

    Such as a pooler, which is there for some heads alone. And every loose parameter, one that belongs to no layer of
    torch's own and to no norm: some are read in training alone (the token of a masked patch), and of others a trace
    holds what they become (a temperature's exponential, the rows of a table of relative positions).
    """
    patterns = [pattern for host in _own_host(config) for pattern in host.dropped]
    loose = _list_loose(empty_model(config)) if is_own(config.model_type) else frozenset()
    return lambda name: name in loose or any(fnmatchcase(name, pattern) for pattern in patterns)


def _list_loose(model: PreTrainedModel) -> frozenset[str]:
    """Names of a model's loose parameters, but for routers' and experts'."""
    classes = classify_parameters(model)
    return frozenset(
        name
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.modules") and "Norm" not in type(module).__name__
        for name, _ in module.named_parameters(path, recurse=False)
        if classes.get(name, "norm") == "norm"
    )


def _own_host(config: PreTrainedConfig) -> tuple[Host, ...]:
    """The dense family of a mixture of ours; none of any other."""
    host = find_host(config.model_type) if is_own(config.model_type) else None
    return () if host is None else (host,)


def locate_parameters(model: PreTrainedModel, shapes: Shapes) -> dict[str, tuple[RowRange, ...]]:
    """Where each parameter and stored buffer lies, in order.

    The place is a list of rows of the checkpoint's tensors. What the checkpoint lacks and the model makes itself, such
    as Marian's positions, has none.

    Raises:
        ExportError: the checkpoint's tensors are not those that transformers would save, or no rows of them.
    """
    may_lack = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    every = model.state_dict(keep_vars=True)
    held = {id(value) for name, value in every.items() if name in shapes}
    stored = {
        name: value
        for name, value in every.items()
        if id(value) in held or not any(pattern.search(name) for pattern in may_lack)
    }
    firsts: dict[int, str] = {}
    for name, value in stored.items():
        firsts.setdefault(id(value), name)
    # of tied parameters the first, or the one that the checkpoint has
    firsts |= {id(value): name for name, value in reversed(stored.items()) if name in shapes}
    parameters = {name: stored[name] for name in firsts.values()}
    numbers, begins, count = {}, {}, 0
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape) if parameter.ndim < 2 else (*parameter.shape[:-1], 1)
        begins[name] = count
        numbers[name] = torch.arange(count, count + math.prod(shape)).reshape(shape)
        count += math.prod(shape)
    # a checkpoint of ours is opened under the names of the modules (`checkpoints.module_names`)
    saved = numbers if is_own(model.config.model_type) else revert_weight_conversion(model, numbers)
    tensors = {name: tensor.flatten() for name, tensor in saved.items()}
    missing = sorted(set(tensors) - set(shapes))
    unknown = sorted(set(shapes) - set(tensors))
    if missing or unknown:
        wrong = (
            f"has no tensor '{missing[0]}'" if missing else f"has a tensor '{unknown[0]}' that belongs to no parameter"
        )
        raise ExportError(
            f"the checkpoint of model_type {model.config.model_type} {wrong}; it must be as transformers' "
            "save_pretrained writes it"
        )
    names = list(tensors)
    owner, row = torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
    for number, name in enumerate(names):
        found, shape = tensors[name], shapes[name]
        if len(found) != (math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)):
            raise ExportError(
                f"tensor '{name}' {list(shape)} fits no parameter of model_type {model.config.model_type}"
            )
        owner[found], row[found] = number, torch.arange(len(found))
    if count and int(owner.min()) < 0:
        raise ExportError(
            f"model_type {model.config.model_type} stores parameters that cannot be mapped to the checkpoint's rows"
        )
    located = {}
    for name, numbered in numbers.items():
        own = slice(begins[name], begins[name] + numbered.numel())
        located[name] = _pieces(names, owner[own], row[own])
    return {name: located[firsts[id(value)]] for name, value in stored.items()}


def _pieces(names: list[str], owner: torch.Tensor, row: torch.Tensor) -> tuple[RowRange, ...]:
    """Runs of consecutive rows in one tensor."""
    if not len(owner):
        return ()
    breaks = ((owner[1:] != owner[:-1]) | (row[1:] != row[:-1] + 1)).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(owner)]
    return tuple(RowRange(names[owner[a]], int(row[a]), int(row[b - 1]) + 1) for a, b in zip(starts, ends, strict=True))


def find_routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The router beside every module of experts.

    By the name of the module that has both.
    """
    routers = {}
    for name, module in model.named_modules():
        if hasattr(module, "experts"):
            router = getattr(module, "gate", None) or getattr(module, "router", None)
            if isinstance(router, nn.Module):
                routers[name] = router
    return routers


def classify_parameters(model: PreTrainedModel) -> dict[str, TensorClass]:
    """The class of every parameter, by its module's type.

    What is no matrix of a plain product, embedding or expert stays as it is, as norms do. Plain products inside of
    attention are "attention", others of an FFN, which counts with the experts; those beside experts route or gate. A
    stored buffer of a router or beside it, its selection bias, routes too.
    """
    routers, head = list(find_routers(model).values()), model.get_output_embeddings()
    table = getattr(find_embeddings(model), "weight", None)
    classes: dict[str, TensorClass] = {}
    stored = model.state_dict()
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        if hasattr(module, "experts") or any(module is router for router in routers):
            classes |= {
                f"{path}.{name}": "router"
                for name, _ in module.named_buffers(recurse=False)
                if f"{path}.{name}" in stored
            }
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if table is not None and getattr(module, "weight", None) is table:  # the embedding, or tied to it
                classes[full] = "embedding" if name == "weight" else "bias"
            elif module is head:
                classes[full] = "head" if name == "weight" else "bias"
            elif hasattr(module, "is_transposed"):  # experts, as transformers marks them
                classes[full] = "bias" if name.endswith("_bias") else "experts"
            elif any(module is part for router in routers for part in router.modules()) or (
                type(module) is nn.Linear and hasattr(parent, "experts")
            ):
                classes[full] = "router"
            elif type(module) in (nn.Linear, Conv1D):
                classes[full] = "bias" if name == "bias" else "attention" if _is_attention(path) else "experts"
            else:
                classes[full] = "norm"
    return classes


def _is_attention(path: str) -> bool:
    return "attn" in path or "attention" in path.lower()


def classify_tensors(config: PreTrainedConfig, shapes: Shapes) -> dict[str, TensorClass]:
    """The class of every tensor, from config and shapes alone.

    The tensors are a checkpoint's.

    Raises:
        ExportError: a tensor is part of parameters of several classes, or of none.
    """
    model = empty_model(config, shapes)
    located, classes = locate_parameters(model, shapes), classify_parameters(model)
    found: dict[str, TensorClass] = {}
    for parameter, pieces in located.items():
        own = classes.get(parameter, "norm")  # a stored buffer
        for piece in pieces:
            if {found.get(piece.name), own} == {"bias", "norm"}:  # a vector that two modules share
                found[piece.name] = "bias"
            elif found.setdefault(piece.name, own) != own:
                raise ExportError(
                    f"tensor '{piece.name}' is {found[piece.name]} and {own} at once; it can be neither quantized "
                    "nor exported"
                )
    empty = {name: classes.get(name, "norm") for name, shape in shapes.items() if not math.prod(shape)}
    return empty | found
