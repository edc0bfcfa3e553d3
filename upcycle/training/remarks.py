"""Warnings after fine-tuning: no gain, routers without a gradient, idle experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch

from dense2moe.upcycle.training.config import FinetuneConfig
from dense2moe.upcycle.training.facts import Evaluation
from dense2moe.upcycle.training.history import ModelName, Step
from dense2moe.upcycle.training.phase import Trained


def find_harm(trained: Mapping[ModelName, Trained], evaluations: Mapping[ModelName, Evaluation]) -> Iterator[str]:
    """Models that training did not help.

    No evaluation was better than the start, or the weights that were kept are worse on the test split.
    """
    for name, each in trained.items():
        started = evaluations["upcycled" if name == "fine-tuned" else "dense"].figures[0]
        if each.best_step == 0:
            yield (
                f"{name}: no evaluation on the validation split was better than at the start, so the start's weights "
                "were kept; "
                "lower finetune.learning_rate, or give more text or steps"
            )
        elif (reached := evaluations[name].figures[0]).gain(started.value) < 0:
            yield (
                f"{name}: the kept weights, of step {each.best_step}, have a {reached.name} of {reached.value:.5g} on "
                f"the test split, the start had {started.value:.5g}; lower finetune.learning_rate, or give more text "
                "or steps"
            )


def find_imbalance(history: tuple[Step, ...], gradient: float, phases: tuple[FinetuneConfig, ...]) -> Iterator[str]:
    """Remarks on routers that learned nothing and on idle experts."""
    if gradient < 1e-6 and not any(phase.domain_coefficient for phase in phases):
        yield (
            f"the routers' task gradient was {gradient:.0e} of the whole at the start: equal experts give a "
            "renormalizing router nothing to learn "
            "from; it followed the balance loss until the experts diverged; set upcycle.experts.noise to make them "
            "differ at the start"
        )
    if phases[-1].routing == "by-domain":
        yield (
            "the last of finetune.stages is by-domain: the routers have not learned which experts learned from which "
            "text; add a phase in which routers learn"
        )
        return
    for number, loads in _recent_loads(history).items():
        dead = [expert for expert, load in enumerate(loads) if load < 0.1 / len(loads)]
        if dead:
            yield (
                f"layer {number}: experts {dead} get less than a tenth of their share of tokens; raise "
                "finetune.balance_coefficient"
            )


def _recent_loads(history: tuple[Step, ...]) -> dict[int, list[float]]:
    """Mean load of each layer's experts over the last interval.

    By the layer's number; the interval begins after the evaluation before the last. Of the last model and phase: over
    all steps between the last two evaluations.
    """
    lines = [step for step in history if step.layers]
    if not lines:
        return {}
    last = lines[-1]
    same_phase = [step for step in history if (step.model, step.phase) == (last.model, last.phase)]
    evaluations = [step.step for step in same_phase if step.validation_loss is not None and step.step < last.step]
    start = max(evaluations, default=0)
    # each line has the mean load over the steps since the line before it
    num_steps = [line.step - before for line, before in zip(lines, [0, *(line.step for line in lines)], strict=False)]
    recent = [
        (line, count)
        for line, count in zip(lines, num_steps, strict=True)
        if line.phase == last.phase and line.step > start
    ]
    total = sum(count * torch.tensor([layer.load for layer in line.layers]) for line, count in recent)
    means = cast(torch.Tensor, total / sum(count for _, count in recent))
    return {layer.number: load for layer, load in zip(last.layers, means.tolist(), strict=True)}
