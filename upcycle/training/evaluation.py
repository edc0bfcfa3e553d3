"""Held-out loss and speed of a torch model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.memory import small_heap
from dense2moe.upcycle.numbers import language_figures, perplexity
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.training.facts import Evaluation
from dense2moe.upcycle.training.frozen import compute_wide, load_stored
from dense2moe.upcycle.training.objective import next_token_loss
from dense2moe.upcycle.training.prompt import read_prompt, run_with_prompt

EVALUATION_BATCH = 8


@torch.no_grad()  # not inference_mode: what FSDP gathers in its first pass it keeps for training
def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor, prompt: torch.Tensor | None = None) -> float:
    """Mean next-token loss in nats over blocks of token ids [blocks, block_size].

    Each after the vectors of `prompt` [P, H] where there are some.
    No position sees another block.
    """
    losses = held_out_losses(model, blocks, prompt)
    return sum(losses) / len(losses)


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, blocks: torch.Tensor, prompt: torch.Tensor | None = None) -> list[float]:
    """The mean next-token loss of each block; see `held_out_loss`."""
    losses: list[float] = []
    for batch in blocks.split(EVALUATION_BATCH):
        batch = batch.to(model.device)
        logits = run_with_prompt(model, model, batch, prompt)
        losses += [float(next_token_loss(row[None], block[None])) for row, block in zip(logits, batch, strict=True)]
    return losses


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int = 8, repeats: int = 3) -> float:
    """Tokens per second of greedy decoding with a KV cache at batch 1 after `prompt` [S].

    The median of `repeats` that follow each other.
    """
    speeds = []
    output = model(input_ids=prompt[None].to(model.device), use_cache=True)
    token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    token.item()  # a device may still be at it
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(num_tokens):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        token.item()
        speeds.append(num_tokens / (time.perf_counter() - started))
    return sorted(speeds)[repeats // 2]


def evaluate(directory: Path, blocks: torch.Tensor, name: str, progress: Progress) -> Evaluation:
    """Measure a checkpoint on held-out blocks [blocks, block_size]: decoding as stored, the loss in float32."""
    progress(f"evaluating {name}", 0, 1)
    model = load_stored(directory)
    cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    speed = decode_speed(model, blocks[0, : max(1, blocks.shape[1] // 2)])
    compute_wide(model)
    prompt = read_prompt(directory)
    with small_heap(model):
        losses = held_out_losses(model, blocks, None if prompt is None else prompt.to(model.device))
    loss = sum(losses) / len(losses)
    weights = sum(p.numel() for p in model.parameters())
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    progress(f"evaluating {name}", 1, 1)
    return Evaluation(loss, perplexity(loss), weights, size, speed, tuple(losses), language_figures(loss))
