"""Experts whose inputs a graph rounds by scales of their own are told apart in the twin."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dense2moe.export.coverage import find_decoder_family
from dense2moe.export.parity.forward import open_reference
from dense2moe.export.parity.inside.products import Arithmetic, ProductMode
from dense2moe.export.quantization.simulation import StaticRounding
from dense2moe.upcycle.checkpoints.reader import open_checkpoint

EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


@pytest.mark.parametrize("stays_on_disk", [False, True])
def test_each_expert_rounds_by_its_own_scales(
    stays_on_disk: bool, mixture_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the formula says it, expert by expert, with the weights as the checkpoint names them."""
    if stays_on_disk:
        monkeypatch.setattr("dense2moe.export.parity.experts_on_disk.LEFT_ON_DISK_BYTES", 1)
    checkpoint = open_checkpoint(mixture_checkpoint)
    scales = {
        (expert, matrix): 0.02 * (1 + expert + 4 * (matrix == "w2"))
        for expert in range(4)
        for matrix in ["w1", "w2", "w3"]
    }
    for expert in range(4):
        scales[expert, "w3"] = scales[expert, "w1"]  # both read the same
    rounds: dict[str, Any] = {
        EXPERT.format(layer=layer, expert=expert, matrix=matrix): StaticRounding(scale)
        for layer in range(2)
        for (expert, matrix), scale in scales.items()
    }
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    with open_reference(mixture_checkpoint) as reference:
        family = find_decoder_family(checkpoint.config)
        mode = ProductMode(reference, family, Arithmetic(rounds), lambda _, __: logits, nullcontext)
        for layer in (0, 1):
            with mode, torch.inference_mode():
                found = reference.modules[layer](x)[0]
            weights, chosen = logits.softmax(-1).topk(2)
            weights = weights / weights.sum(-1, keepdim=True)
            expected = torch.zeros(12, 32)
            for token in range(12):
                for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
                    w1, w2, w3 = (
                        checkpoint.read(EXPERT.format(layer=layer, expert=expert, matrix=matrix))
                        for matrix in ("w1", "w2", "w3")
                    )
                    step, inner_step = scales[expert, "w1"], scales[expert, "w2"]
                    read = (x[0, token] / step).round().clamp(-128, 127) * step
                    inner = F.silu(w1 @ read) * (w3 @ read)
                    expected[token] += weight * (w2 @ ((inner / inner_step).round().clamp(-128, 127) * inner_step))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        mode.close()
