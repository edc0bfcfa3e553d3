"""Frozen weights: stored in their own dtype, computed with in float32.

What does not learn needs no float32 copy: every bfloat16 and every float16 number is a float32 number, so a matrix that
is cast where it is multiplied gives, bit for bit, what a float32 copy of it gives. The cast matrix lives as long as its
product: autograd keeps the narrow one, and casts it again in the backward pass. Under autocast, products are what
autocast makes of them. Vectors (norms, biases) and routers are next to nothing, and are float32 like what learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import SELECTION_BIASES, load_model, router_modules
from dense2moe.upcycle.checkpoints.narrow import is_look_up, use_narrow
from dense2moe.upcycle.checkpoints.reader import open_checkpoint
from dense2moe.upcycle.checkpoints.tensors import DTYPES
from dense2moe.upcycle.errors import UpcycleError
from dense2moe.upcycle.tasks.head import LabelHead
from dense2moe.upcycle.training.expert_forward import use_sorted_experts


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that holds every tensor of a checkpoint.

    float32 where the tensors' dtypes differ. A selection bias, which is float32 wherever it is, is left out.
    """
    entries = open_checkpoint(directory).entries
    found = {entry.dtype for name, entry in entries.items() if not name.endswith(SELECTION_BIASES)}
    return DTYPES[found.pop()] if len(found) == 1 and found <= DTYPES.keys() else torch.float32


def load_frozen(directory: Path, task: str = "text-generation", head: LabelHead | None = None) -> PreTrainedModel:
    """A frozen checkpoint: weights as stored, arithmetic in float32.

    `task` names its head as Hugging Face names tasks; a `head` that it lacks is drawn, the same at each loading.
    """
    model = load_stored(directory, task, head)
    compute_wide(model)
    return model


def load_stored(directory: Path, task: str = "text-generation", head: LabelHead | None = None) -> PreTrainedModel:
    """A checkpoint in its stored dtype.

    `task` names its head as Hugging Face names tasks; a `head` that it lacks is drawn, the same at each loading.
    """
    return load_model(directory, stored_dtype(directory), task, head)


def compute_wide(model: PreTrainedModel) -> None:
    """Make a frozen model compute in float32, whatever its weights' dtype."""
    model.requires_grad_(False)
    keep_narrow(model)
    if next(router_modules(model), None) is not None:
        use_sorted_experts(model)


def keep_narrow(model: PreTrainedModel) -> None:
    """Make a model with narrow frozen matrices compute in float32.

    Under autocast, in autocast's dtype. Frozen matrices keep their dtype; all other parameters become float32.
    """
    narrow = {
        id(parameter)
        for parameter in _matrices(model)
        if not parameter.requires_grad and parameter.dtype != torch.float32
    }
    for parameter in model.parameters():
        if id(parameter) not in narrow:
            parameter.data = parameter.data.to(torch.float32)
    use_narrow(model)


def _matrices(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Weights that only a product or a look-up reads.

    Of linear layers, embeddings and stacked experts, but not of routers.
    """
    routers = {id(parameter) for router in router_modules(model) for parameter in router.parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            plain = (isinstance(module, nn.Linear) or is_look_up(module)) and parameter.ndim == 2
            if (plain or parameter.ndim == 3) and id(parameter) not in routers:
                yield parameter


def narrow(model: PreTrainedModel, dtype: torch.dtype, where: str) -> None:
    """Round every weight to `dtype`, to be written.

    Raises:
        UpcycleError: a weight is beyond its range.
    """
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if dtype == torch.float16 and parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            key, mend = ("finetune", "set finetune.dtype to 'float32'")
            if where == "branch":
                key, mend = ("branch", "lower branch.learning_rate")
            raise UpcycleError(f"{key}: '{name}' of {where} has grown beyond float16, the dtype of the source; {mend}")
