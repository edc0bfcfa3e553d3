"""The mixture of experts, and the receipt of its equality.

The receipt shows that it computes what the dense model does.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dense2moe.convert.locations import SOURCES, find_router_base
from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.report.facts import UpcycleFacts
from dense2moe.upcycle.building.making import make_mixture
from dense2moe.upcycle.building.plan import plan_upcycle
from dense2moe.upcycle.checkpoints.adapter import open_sources
from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.data.config import name_domains, reads_images
from dense2moe.upcycle.data.examples import read_examples
from dense2moe.upcycle.numbers import name_specials

RECEIPT_NAME = "receipt.json"


def list_settings(preparation: Preparation, _: str | None) -> Facts:
    """Experts, router and seed."""
    recipe = preparation.recipe
    return {
        **preparation.plan.settings.model_dump(mode="json"),
        "domain_files": dict(preparation.domain_files),
        "block_size": recipe.data.block_size,
        "seed": recipe.seed,
        **({"sources": list(preparation.plan.sources)} if preparation.plan.sources else {}),
    }


def find_sources(run: StageRun) -> dict[str, Path]:
    """The directories of the checkpoints fine-tuned from the dense one.

    Branches, in the order of their domains, or sources of the recipe.
    """
    if run.recipe.branch:
        return {domain: run.inputs[f"branch-{domain}"] for domain in run.recipe.branched}
    return {name: run.inputs["source"] / SOURCES / name for name in run.preparation.sources}


def run_stage(run: StageRun) -> UpcycleFacts:
    """The mixture, checked tensor by tensor, and its receipt.

    Tensors are compared with what they were made of.
    """
    recipe, sources, plan = run.recipe, find_sources(run), run.preparation.plan
    if recipe.branch:  # the preparation had the dense checkpoint in their places
        checkpoint = run.preparation.checkpoint
        domains = name_domains(recipe.data.source)
        plan = plan_upcycle(checkpoint, recipe.upcycle, open_sources(checkpoint, sources), domains)
    made = make_mixture(
        run.inputs["source"],
        run.output,
        plan,
        read_examples(run.inputs["data"], "train"),
        find_router_base(run.preparation.loaded),
        recipe.seed,
        recipe.data.block_size,
        run.progress,
        sources,
        None if reads_images(recipe.data.source) else read_blocks(run.inputs["data"], "validation"),
    )
    plan, settings, reading, receipt = made.plan, made.plan.settings, made.reading, made.receipt
    (run.output / RECEIPT_NAME).write_text(
        json.dumps(name_specials(asdict(receipt)), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    return UpcycleFacts(
        target=plan.conversion.target.architecture,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_tok,
        num_layers=plan.num_layers,
        num_sparse_layers=len(plan.sites),
        num_parameters=plan.num_parameters,
        num_active_parameters=plan.num_active_parameters,
        num_bytes=plan.num_bytes,
        dropped=list(plan.dropped),
        keeps_function=plan.keeps_function,
        num_tensors_compared=made.num_tensors,
        router_text_tokens=list(reading.num_tokens) if reading else [],
        router_loads={str(site): load for site, load in reading.loads.items()} if reading else {},
        receipt_mode=receipt.mode,
        receipt_notes=list(receipt.notes),
        receipt=list(receipt.comparisons),
        experts=[("", *plan.sources)[owner] for owner in plan.owners] if sources else [],
        merging=settings.merging.method if sources else None,
        distances=list(made.distances),
        soup=list(made.soup),
        router=settings.router.kind,
    )
