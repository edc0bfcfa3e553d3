"""Held-out loss and speed of a torch model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.memory import small_heap
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task
from dense2moe.upcycle.training.facts import Evaluation
from dense2moe.upcycle.training.frozen import compute_wide, load_stored
from dense2moe.upcycle.training.prompt import read_prompt, run_with_prompt

EVALUATION_BATCH = 8


@torch.no_grad()  # not inference_mode: what FSDP gathers in its first pass it keeps for training
def held_out_loss(
    model: PreTrainedModel, blocks: torch.Tensor, prompt: torch.Tensor | None = None, task: Task = NEXT_TOKEN
) -> float:
    """Mean loss of the task over blocks of token ids [blocks, block_size].

    Every block stands alone, after the vectors of `prompt` [P, H] where there are some.
    """
    losses = held_out_losses(model, blocks, prompt, task)
    return sum(losses) / len(losses)


@torch.no_grad()
def held_out_losses(
    model: PreTrainedModel, blocks: torch.Tensor, prompt: torch.Tensor | None = None, task: Task = NEXT_TOKEN
) -> list[float]:
    """The mean loss of each block; see `held_out_loss`."""
    losses: list[float] = []
    for ids in blocks.split(EVALUATION_BATCH):
        batch = {"input_ids": ids.to(model.device)}
        predictions = run_with_prompt(model, model, task.inputs(batch), prompt)
        for row, block in zip(predictions, batch["input_ids"], strict=True):
            losses.append(float(task.loss(row[None], {"input_ids": block[None]})))
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


def evaluate(
    directory: Path, blocks: torch.Tensor, name: str, progress: Progress, task: Task = NEXT_TOKEN
) -> Evaluation:
    """Measure a checkpoint on held-out blocks [blocks, block_size]: decoding as stored, the loss in float32."""
    progress(f"evaluating {name}", 0, 1)
    model = load_stored(directory, task.name)
    cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    speed = decode_speed(model, blocks[0, : max(1, blocks.shape[1] // 2)])
    compute_wide(model)
    prompt = read_prompt(directory)
    with small_heap(model):
        losses = held_out_losses(model, blocks, None if prompt is None else prompt.to(model.device), task)
    loss = sum(losses) / len(losses)
    weights = sum(p.numel() for p in model.parameters())
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    progress(f"evaluating {name}", 1, 1)
    return Evaluation(loss, task.figures(loss), weights, size, speed, tuple(losses))
