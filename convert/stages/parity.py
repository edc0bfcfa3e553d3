"""The package against its twin, and against the exported model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import cast

from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.report.facts import ParityFacts
from dense2moe.export.graph.config import rounds_activations
from dense2moe.export.opening import open_package
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.passes import check_passes
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.variant import Variant
from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.numbers import name_specials
from dense2moe.upcycle.training.task_choice import choose_task

PARITY_NAME = "parity.json"


def list_settings(preparation: Preparation, item: str | None) -> Facts:
    """Thresholds, and the text and tasks they apply to."""
    recipe, variant = preparation.recipe, cast(Variant, item)
    return {
        **recipe.parity.model_dump(mode="json"),
        "task_files": dict(preparation.task_files),
        "variant": variant,
        "rounds_activations": rounds_activations(variant, recipe.export),
    }


def run_stage(run: StageRun) -> ParityFacts:
    """The figures of one variant.

    Thresholds are judged after the report is written.
    """
    is_trained = run.recipe.finetune is not None
    subject = ParitySubject(
        run.inputs["onnx"],
        run.inputs["quantize"],
        run.inputs["exported"],
        read_blocks(run.inputs["data"], "test"),
        run.variant,
        rounds_activations(run.variant, run.recipe.export),
        tasks=run.preparation.tasks,
        finetuned_losses=run.input_facts["exported"]["evaluations"]["fine-tuned"]["block_losses"]
        if is_trained
        else None,
    )
    if open_package(run.inputs["onnx"]).has_cache:
        parity = check_parity(subject, run.recipe.parity, run.progress)
    else:
        parity = check_passes(subject, choose_task(run.inputs["exported"]), run.recipe.parity, run.progress)
    breaches = list(parity.breaches)
    if not is_trained:  # parity calls the model that was exported the fine-tuned one
        breaches = [breach.replace("fine-tuned model", "upcycled model") for breach in breaches]
    facts = ParityFacts(parity.providers, breaches, parity.passed)
    text = json.dumps(name_specials(asdict(facts)), indent=2, allow_nan=False)
    (run.output / PARITY_NAME).write_text(text + "\n", encoding="utf-8")
    return facts
