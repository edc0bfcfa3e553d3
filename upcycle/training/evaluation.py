"""Held-out loss and speed of a torch model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.data.packing import choose_evenly
from dense2moe.upcycle.memory import small_heap
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.examples import Examples
from dense2moe.upcycle.tasks.held_out import HeldOut, judge_examples, tell_nobody
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN
from dense2moe.upcycle.tasks.task import Task, take_logits
from dense2moe.upcycle.training.facts import Evaluation, SameLosses
from dense2moe.upcycle.training.frozen import compute_wide, load_stored
from dense2moe.upcycle.training.history import ModelName
from dense2moe.upcycle.training.prompt import read_prompt, run_with_prompt

_CHECKED_BLOCKS = 4
_MEASURED = ("loss", "figures", "block_losses", "labels")
_SAME_LOSS = 1e-5
"""Nats a token that rounding may move the mean loss of a block by; it moves perplexity by 1e-5 of itself."""


def held_out_loss(model: PreTrainedModel, blocks: torch.Tensor, prompt: torch.Tensor | None = None) -> float:
    """Mean next-token loss over blocks of token ids [blocks, block_size].

    Every block stands alone, after the vectors of `prompt` [P, H] where there are some.
    """
    return judge_model(model, Examples.of_blocks(blocks), NEXT_TOKEN, prompt).loss


def judge_model(
    model: PreTrainedModel,
    examples: Examples,
    task: Task = NEXT_TOKEN,
    prompt: torch.Tensor | None = None,
    before: Callable[[Examples], None] = tell_nobody,
) -> HeldOut:
    """Losses and answers of a model on examples.

    Every example stands alone, after the vectors of `prompt` [P, H] where there are some. Each batch is told to
    `before`.
    """
    read = task.predictions
    return judge_examples(
        lambda inputs: run_with_prompt(model, model, inputs, prompt, read), examples, model.device, task, before
    )


def take_blocks(examples: Examples, num_domains: int, most: int) -> Examples:
    """Some blocks of each domain, `most` at most, evenly over the whole."""
    places = [torch.nonzero(examples.domains == number).flatten() for number in range(num_domains)]
    chosen = torch.cat([own[choose_evenly(len(own), most)] for own in places])
    return examples.take(chosen)


def losses_by_domain(
    model: PreTrainedModel, examples: Examples, names: Sequence[str], task: Task = NEXT_TOKEN
) -> dict[str, float]:
    """A model's mean loss over the blocks of each domain."""
    return average_by_domain(judge_model(model, examples, task).losses, examples.domains, names)


def average_by_domain(losses: Sequence[float], domains: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """The mean of blocks' losses by domain.

    `domains` [blocks] has the number of each block's domain, `names` the domains' names.
    """
    exact = torch.tensor(losses, dtype=torch.float64)
    return {name: float(exact[domains == number].mean()) for number, name in enumerate(names)}


@torch.inference_mode()
def decode_speed(model: PreTrainedModel, prompt: torch.Tensor, num_tokens: int = 8, repeats: int = 3) -> float:
    """Tokens per second of greedy decoding after `prompt` [S].

    With a KV cache, at batch 1.

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


@torch.inference_mode()
def pass_speed(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    num_tokens: int,
    read: Callable[[Any], torch.Tensor] = take_logits,
    repeats: int = 3,
) -> float:
    """Tokens per second of a pass over `num_tokens`, the median of `repeats`."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        read(model(**inputs)).sum().item()  # a device may still be at it
        seconds.append(time.perf_counter() - started)
    return num_tokens / sorted(seconds[1:])[repeats // 2]


def evaluate(
    directory: Path,
    examples: Examples,
    name: str,
    progress: Progress,
    task: Task = NEXT_TOKEN,
    equal: tuple[ModelName, Evaluation] | None = None,
) -> Evaluation:
    """Measure a checkpoint on held-out examples.

    It decodes in its stored dtype; the loss is measured in float32. `equal` is another model with its evaluation on the
    same examples, which computes the same but for rounding. A few are read, and where their losses are those of
    the other model, all its losses are taken; where one is not, every example is read.
    """
    progress(f"evaluating {name}", 0, 1)
    model = load_stored(directory, task.name, task.head)
    cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    decode = prefill = None
    if task.decodes and "past_key_values" in inspect.signature(model.forward).parameters:
        decode = decode_speed(model, examples.ids[0, : max(1, examples.block_size // 2)])
    else:
        longest = examples.take(examples.lengths.argmax()[None])
        inputs = task.inputs({each: tensor.to(model.device) for each, tensor in longest.batch().items()})
        prefill = pass_speed(model, inputs, longest.block_size, task.predictions)
    compute_wide(model)
    prompt = read_prompt(directory)

    def measure(some: Examples) -> HeldOut:
        return judge_model(model, some, task, None if prompt is None else prompt.to(model.device))

    with small_heap(model):
        same = None if equal is None else _compare(*equal, examples, measure)
        found = None if same else measure(examples)
    weights = sum(p.numel() for p in model.parameters())
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    progress(f"evaluating {name}", 1, 1)
    if found is None:
        assert equal is not None
        loss, figures, losses, labels = (getattr(equal[1], name) for name in _MEASURED)
    else:
        loss, figures, losses, labels = found.loss, found.figures(task), found.losses, task.scores(found.answers)
    return Evaluation(
        loss, figures, weights, size, decode, losses, same, prefill_tokens_per_second=prefill, labels=labels
    )


def _compare(
    name: ModelName, other: Evaluation, examples: Examples, measure: Callable[[Examples], HeldOut]
) -> SameLosses | None:
    """The comparison with another model on a few examples, or None.

    They are taken evenly. None where the losses differ, or where there are no more than that.
    """
    count = len(examples)
    if count <= _CHECKED_BLOCKS:
        return None
    places = [number * count // _CHECKED_BLOCKS for number in range(_CHECKED_BLOCKS)]
    found = measure(examples.take(torch.tensor(places))).losses
    differences = [abs(own - other.block_losses[place]) for own, place in zip(found, places, strict=True)]
    is_same = all(difference <= _SAME_LOSS for difference in differences)  # NaN is not
    return SameLosses(name, len(places), max(differences)) if is_same else None
