"""The routers' share of the task's gradient before training."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dense2moe.upcycle.checkpoints.layers import find_layers
from dense2moe.upcycle.checkpoints.loaded import router_weights
from dense2moe.upcycle.memory import release_memory
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.frozen import load_frozen


def measure_router_gradient(mixture: Path, examples: Examples, task: Task) -> float:
    """The routers' share of the task loss's gradient norm.

    The share is relative to the norm in all weights. On a few examples. About zero (1e-9) while
    experts are equal and weights are renormalized: the router then learns from the balance loss alone, until the
    experts have come apart. Each layer is computed a second time in the backward pass, and each weight's gradient is
    let go when it is squared: in memory are the weights as stored, one layer's inner values, and the gradient of one
    weight.
    """
    model = load_frozen(mixture, task.name, task.head)
    routers = {id(weight) for weight in router_weights(model)}
    router_square = other_square = 0.0

    def let_go(parameter: torch.Tensor) -> None:
        nonlocal router_square, other_square
        assert parameter.grad is not None
        square = float(parameter.grad.float().square().sum())
        if id(parameter) in routers:
            router_square += square
        else:
            other_square += square
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.numel():
            parameter.requires_grad_().register_post_accumulate_grad_hook(let_go)
    layers: Any = find_layers(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    model.config.use_cache = False  # a layer that is computed again would be told of its keys twice
    batch = examples.batch()
    task.loss(task.predictions(model(**task.inputs(batch))), batch).backward()
    del model, layers, layer, parameter
    release_memory()  # a layer and its checkpointed pass hold each other
    return math.sqrt(router_square / max(router_square + other_square, 1e-30))
