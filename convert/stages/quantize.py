"""Integers and scales, and the torch twin that computes with them."""

from __future__ import annotations

from typing import cast

from dense2moe.convert.preparation import Facts, Preparation, StageRun
from dense2moe.export.quantization.facts import QuantizeFacts
from dense2moe.export.quantization.quantizer import QuantizeInputs, quantize_checkpoint
from dense2moe.export.variant import QUANTIZED, Variant, element_type, float_type, rounds_to_8_bits
from dense2moe.upcycle.data.blocks import read_blocks
from dense2moe.upcycle.data.config import reads_images


def list_settings(preparation: Preparation, item: str | None) -> Facts:
    """Bits and groups of one variant, and its graph's element type."""
    recipe, variant = preparation.recipe, cast(Variant, item)
    device = recipe.export.device
    settings = recipe.quantize.model_dump(mode="json") if variant in QUANTIZED else {}
    types = {"element_type": element_type(variant, device), "float_type": float_type(variant, device)}
    rounds = {"activation_bits": recipe.export.activation_bits} if rounds_to_8_bits(variant, device, 8) else {}
    return {"variant": variant, **types, **settings, **rounds}


def run_stage(run: StageRun) -> QuantizeFacts:
    """The twin of one variant, calibrated on training text."""
    recipe, data = run.recipe, run.inputs["data"]
    return quantize_checkpoint(
        run.inputs["exported"],
        run.output,
        run.variant,
        recipe.quantize,
        run.progress,
        QuantizeInputs(
            device=recipe.export.device,
            activation_bits=recipe.export.activation_bits,
            blocks=None if reads_images(recipe.data.source) else read_blocks(data, "train"),
            held_out=read_blocks(data, "validation") if run.variant == "mixed" else None,
            scratch=run.scratch,
        ),
    )
