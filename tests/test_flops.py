"""Operations of training, beside those that torch itself counts while it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dense2moe.upcycle.checkpoints.loaded import load_model, sparse_layers
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN, next_token_loss
from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.flops import forward_flops, training_flops
from dense2moe.upcycle.training.job import load_shape
from dense2moe.upcycle.training.trainable import choose_trainable

BLOCKS = torch.arange(2 * 24).reshape(2, 24) % 97


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.parametrize("train", ["all", "experts", "router", "last-1"])
def test_the_operations_of_a_step_are_those_that_torch_counts(
    kind: str, train: str, dense_checkpoint: Path, mixture_checkpoint: Path
) -> None:
    checkpoint = dense_checkpoint if kind == "dense" else mixture_checkpoint
    settings, layers = FinetuneConfig(train=train), sparse_layers(load_shape(mixture_checkpoint, NEXT_TOKEN))
    model = load_model(checkpoint, torch.float32)
    model.set_attn_implementation("eager")
    choose_trainable(model, settings, layers)
    with FlopCounterMode(display=False) as counter:
        loss = next_token_loss(model(BLOCKS).logits, BLOCKS)
        forward = counter.get_total_flops()
        loss.backward()
    counted = training_flops(load_shape(checkpoint, NEXT_TOKEN), settings, layers, 24) * BLOCKS.numel()
    assert forward_flops(load_shape(checkpoint, NEXT_TOKEN), 24) * BLOCKS.numel() == pytest.approx(forward, rel=0.02)
    # gradients of activations are counted in every layer, and torch leaves out those below the first that learns
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03 if train == "all" else 0.35)
    assert counted >= 0.99 * counter.get_total_flops()
