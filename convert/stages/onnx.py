"""The ONNX package."""

from __future__ import annotations

from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.export.facts import OnnxFacts
from dense2moe.export.package import write_package


def list_settings(preparation: Preparation, _: str | None) -> Facts:
    """The graph's settings."""
    return preparation.recipe.export.model_dump(mode="json")


def run_stage(run: StageRun) -> OnnxFacts:
    """The package of one variant."""
    return write_package(run.inputs["quantize"], run.output, run.recipe.export, run.progress)
