"""Modules whose matrices are narrower than what they compute with.

Every bfloat16 and every float16 number is a float32 number, so a matrix that is cast where it is multiplied gives, bit
for bit, what a float32 copy of it gives, and the cast matrix lives as long as its product.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from dense2moe.upcycle.checkpoints.products import product

_SCALE = "scalar_embed_scale"  # of Gemma's embedding, where the tensor beside it is rounded to the dtype of loading


def use_narrow(model: nn.Module) -> None:
    """Let modules cast their narrow matrices to float32 when used.

    Narrow means narrower than float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype != torch.float32:
            module.__class__ = _narrow_class(cast(Any, type(module)), _multiply)
        elif is_look_up(module) and cast(Any, module).weight.dtype != torch.float32:
            module.__class__ = _narrow_class(cast(Any, type(module)), _look_up)


@cache
def _narrow_class(kind: Any, forward: Any) -> Any:
    """A class of modules with another forward pass.

    A function on the module itself would be a cycle, and keep a model until garbage is collected.
    """
    return type(f"Narrow{kind.__name__}", (kind,), {"forward": forward})


def _multiply(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    found = product(x, module.weight)
    return found if module.bias is None else found + module.bias.to(found.dtype)


def is_look_up(module: nn.Module) -> bool:
    """Whether a module is an embedding, scaled or not."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, _SCALE))


def _look_up(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    found = F.embedding(ids, module.weight, module.padding_idx).to(torch.float32)
    return found * getattr(module, _SCALE) if hasattr(module, _SCALE) else found


def keep_linear_narrow(model: nn.Module) -> None:
    """Make a dense model compute in float32 from narrow matrices.

    Those of linear layers stay as they are stored; all other parameters are cast.
    """
    kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.float32)
    use_narrow(model)
