"""The selection of pictures that the facts have numbers for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import matplotlib

from dense2moe.convert.report.facts import ReportFacts
from dense2moe.convert.report.pictures.agreement import draw_hidden_errors, draw_margins, draw_routing
from dense2moe.convert.report.pictures.drawing import SETTINGS, Drawing, Picture
from dense2moe.convert.report.pictures.heat_maps import draw_labels, draw_loads, draw_specialization
from dense2moe.convert.report.pictures.sizes import draw_search, draw_sizes, draw_speeds
from dense2moe.convert.report.pictures.training import (
    draw_balance,
    draw_compute,
    draw_distances,
    draw_routers,
    draw_training,
)
from dense2moe.convert.report.summary import Row


def draw_pictures(facts: ReportFacts, rows: Sequence[Row]) -> list[Picture]:
    """Every picture that the facts have numbers for."""
    return [draw() for draw in plan_pictures(facts, rows).values()]


def plan_pictures(facts: ReportFacts, rows: Sequence[Row]) -> dict[str, Callable[[], Picture]]:
    """A drawing function for each possible picture, by title."""
    agreements = {name: m.finetuned for name, v in facts.variants.items() if (m := v.parity.measured)}
    finetune, model = facts.finetune, facts.exported
    logged = [step for step in finetune.history if step.layers]
    plan: dict[str, Callable[[], Drawing]] = {}
    if any(step.validation_loss is not None for step in finetune.history):
        plan["Training"] = partial(draw_training, finetune)
    if any(step.validation_loss is not None and step.flops is not None for step in finetune.history):
        plan["Loss and compute"] = partial(draw_compute, finetune)
    plan[f"Size and {facts.figure('dense').name}"] = partial(draw_sizes, rows)
    for name, variant in facts.variants.items():
        if search := variant.quantize.search:
            plan[f"Search of bits, {name}"] = partial(draw_search, name, search)
    if logged:
        plan["Expert load"] = partial(draw_loads, logged[-1])
        plan["Load over training"] = partial(draw_balance, logged)
    if finetune.domains:
        plan["Specialization"] = partial(draw_specialization, finetune.domains, finetune.sparse_layers)
    if finetune.labels:
        plan["Experts by label"] = partial(draw_labels, finetune.labels, finetune.sparse_layers)
    if logged and all(len(layer.load) > 1 for step in logged for layer in step.layers):
        plan["Experts coming apart"] = partial(draw_distances, logged)
        plan["Routers over training"] = partial(draw_routers, logged)
    if any(agreement.routing_agreement for agreement in agreements.values()):
        plan["Routing agreement"] = partial(draw_routing, agreements, model)
    if any(agreement.hidden_error for agreement in agreements.values()):
        plan["Hidden-state error"] = partial(draw_hidden_errors, agreements, model)
    if margins := {name: agreement.margins for name, agreement in agreements.items() if agreement.margins}:
        plan["Router margins and flips"] = partial(draw_margins, margins, model)
    plan["Tokens per second"] = partial(draw_speeds, rows, model)
    return {title: partial(_draw, title, drawing) for title, drawing in plan.items()}


def _draw(title: str, drawing: Callable[[], Drawing]) -> Picture:
    with matplotlib.rc_context(SETTINGS):
        return Picture(title, *drawing())
