"""Floating-point operations of training, counted from shapes.

A multiplication and an addition are two operations. Counted are the products that the model needs: of every weight that
a token meets, and of attention over whole blocks; not what is computed a second time to save memory, nor norms,
activations and softmaxes (PaLM, Chowdhery et al. 2022, appendix B). So a busy machine does not bend the number, and two
models can be compared that were trained on different machines.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.checkpoints.loaded import count_experts
from dense2moe.upcycle.models.routing import find_gate
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.trainable import plan_learning


def training_flops(
    model: PreTrainedModel, settings: FinetuneConfig, sparse_layers: tuple[int, ...], block_size: int
) -> float:
    """Operations for one token of a training step.

    Of the model the shape is enough. Forward, the gradients of activations, and the gradients of what learns.
    """
    planned = plan_learning(model, settings, sparse_layers)
    products = _products(model)
    learning = sum(count for name, count in products.items() if name in planned.whole)
    for number, rows, columns in planned.low_rank.values():
        learning += number * planned.rank * (rows + columns)
    return 4 * sum(products.values()) + 2 * learning + 3 * _attention(model, block_size)


def forward_flops(model: PreTrainedModel, block_size: int) -> float:
    """Operations for one token of a forward pass over blocks.

    Of the model the shape is enough.
    """
    return 2 * sum(_products(model).values()) + _attention(model, block_size)


def _products(model: PreTrainedModel) -> dict[str, float]:
    """Weights that a token is multiplied with, by parameter name.

    Of experts the share that a token visits; a tied head counts once, the embedding's look-up not at all.
    """
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    gate = find_gate(model.config) if count_experts(model) else None
    visited = gate.max_experts_per_token / gate.num_experts if gate else 1.0
    found = {}
    for name, parameter in model.named_parameters():
        is_head = head is not None and parameter is head.weight
        if parameter.ndim >= 2 and (is_head or name not in tables):
            found[name] = parameter.numel() * (visited if ".experts." in name else 1.0)
    return found


def _attention(model: PreTrainedModel, block_size: int) -> float:
    """Operations of attention for one token, in all layers.

    Forward: its scores with a whole block, and the sum that they weigh.
    """
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(4 * block_size * config.num_attention_heads * head_size * config.num_hidden_layers)
