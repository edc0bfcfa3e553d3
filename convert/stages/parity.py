"""The package against its twin, and against the exported model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import cast

import torch

from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.convert.report.facts import ParityFacts
from dense2moe.export.graph.config import rounds_activations
from dense2moe.export.opening import open_package
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.passes import check_passes
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.variant import Variant
from dense2moe.upcycle.data.blocks import read_blocks, read_counted
from dense2moe.upcycle.data.config import ChatData, LabelledSource, reads_images
from dense2moe.upcycle.data.examples import read_examples
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


def _read_blocks(run: StageRun) -> torch.Tensor:
    """Held-out text; nothing where examples are images."""
    if reads_images(run.recipe.data.source):
        return torch.zeros((0, 1), dtype=torch.int64)
    return read_blocks(run.inputs["data"], "test")


def run_stage(run: StageRun) -> ParityFacts:
    """The figures of one variant.

    Thresholds are judged after the report is written.
    """
    is_trained = run.recipe.finetune is not None
    subject = ParitySubject(
        run.inputs["onnx"],
        run.inputs["quantize"],
        run.inputs["exported"],
        _read_blocks(run),
        run.variant,
        rounds_activations(run.variant, run.recipe.export),
        tasks=run.preparation.tasks,
        finetuned_losses=run.input_facts["exported"]["evaluations"]["fine-tuned"]["block_losses"]
        if is_trained and not isinstance(run.recipe.data.source, ChatData)  # whose examples are not these blocks
        else None,
        counted=None if reads_images(run.recipe.data.source) else read_counted(run.inputs["data"], "test"),
        examples=read_examples(run.inputs["data"], "test")
        if isinstance(run.recipe.data.source, LabelledSource)
        else None,
    )
    if open_package(run.inputs["onnx"]).has_cache:
        parity = check_parity(subject, run.recipe.parity, run.progress)
    else:
        task = choose_task(run.inputs["exported"], run.inputs["data"])
        parity = check_passes(subject, task, run.recipe.parity, run.progress)
    breaches = list(parity.breaches)
    if not is_trained:  # parity calls the model that was exported the fine-tuned one
        breaches = [breach.replace("fine-tuned model", "upcycled model") for breach in breaches]
    facts = ParityFacts(parity.providers, breaches, parity.passed)
    text = json.dumps(name_specials(asdict(facts)), indent=2, allow_nan=False)
    (run.output / PARITY_NAME).write_text(text + "\n", encoding="utf-8")
    return facts
