"""A greedy soup: which whole models are averaged, by held-out loss.

Wortsman et al. 2022 ("Model soups"), recipe 1: sort the models by their own held-out loss; begin with the best; add one
after the other, and keep it where the average's loss is no higher than before. A base that is an expert is one of the
models. What the mixture takes of the soup is all that is outside of its experts, which stay each source's own; the loss
is of the whole dense models, FFNs included. So unlike other methods this one needs a model in memory: one, in float32,
whose weights are replaced for every look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dense2moe.upcycle.building.facts import SoupLook
from dense2moe.upcycle.building.merger import average_slices, find_averaged
from dense2moe.upcycle.building.pieces import Slice
from dense2moe.upcycle.building.plan import UpcyclePlan
from dense2moe.upcycle.checkpoints.loading import load_whole
from dense2moe.upcycle.checkpoints.reader import Checkpoint
from dense2moe.upcycle.memory import release_growth
from dense2moe.upcycle.progress import Progress
from dense2moe.upcycle.tasks.held_out import block_losses
from dense2moe.upcycle.tasks.next_token import NEXT_TOKEN

Measure = Callable[[tuple[int, ...]], float]
"""The held-out loss of the average of some models, by their numbers."""

Look = tuple[tuple[int, ...], float, bool]
"""Models that were averaged, their loss, and whether the last of them stayed."""


def choose_soup(
    base: Checkpoint, sources: Mapping[str, Checkpoint], plan: UpcyclePlan, blocks: torch.Tensor, progress: Progress
) -> tuple[tuple[int, ...], tuple[SoupLook, ...]]:
    """The checkpoints that a greedy soup keeps, and every look.

    `blocks` are held-out token ids [blocks, block_size]. Numbers are as the plan's: 0 is the base, then come the
    sources in order.

    Raises:
        UpcycleError: the base cannot be loaded.
    """
    checkpoints, names = (base, *sources.values()), ("", *sources)
    found = _look(checkpoints, plan, blocks, progress)
    release_growth()  # the model
    looks = tuple(SoupLook(tuple(names[number] for number in numbers), loss, kept) for numbers, loss, kept in found)
    return max((numbers for numbers, _, kept in found if kept), key=len), looks


def _look(checkpoints: Sequence[Checkpoint], plan: UpcyclePlan, blocks: torch.Tensor, progress: Progress) -> list[Look]:
    """Every look, by one model whose weights are replaced."""
    candidates = find_averaged(plan)
    model = load_whole(NEXT_TOKEN.model_class, checkpoints[0].directory, torch.float32)
    cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    done, num_looks = 0, 2 * len(candidates) - 1

    def measure(numbers: tuple[int, ...]) -> float:
        nonlocal done
        progress("measuring soups", done, num_looks)
        _fill(model, checkpoints, numbers, plan.dropped)
        losses = block_losses(lambda inputs: model(**inputs).logits, blocks, model.device, NEXT_TOKEN)
        done += 1
        return sum(losses) / len(losses)

    found = add_greedily(candidates, measure)
    progress("measuring soups", num_looks, num_looks)
    return found


def add_greedily(models: Sequence[int], measure: Measure) -> list[Look]:
    """Every look of a greedy soup.

    First each model alone, then the soups. A loss that is NaN is worse than any.
    """
    alone = {model: _nan_last(measure((model,))) for model in models}
    best, *others = sorted(models, key=lambda model: alone[model])
    looks: list[Look] = [((model,), loss, model == best) for model, loss in alone.items()]
    soup: tuple[int, ...] = (best,)
    least = alone[best]
    for model in others:
        loss = _nan_last(measure((*soup, model)))
        kept = loss <= least
        looks.append(((*soup, model), loss, kept))
        if kept:
            soup, least = (*soup, model), loss
    return looks


def _nan_last(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


@torch.no_grad()
def _fill(
    model: PreTrainedModel, checkpoints: Sequence[Checkpoint], numbers: tuple[int, ...], dropped: tuple[str, ...]
) -> None:
    """Give a model the mean of some checkpoints' weights."""
    weights = dict(model.named_parameters())
    for name, entry in checkpoints[0].entries.items():
        if name in dropped:
            continue
        start = 0
        for chunk in average_slices(checkpoints, numbers, Slice(name, 0, entry.shape[0])):
            weights[name][start : start + len(chunk)].copy_(chunk)
            start += len(chunk)
