"""A reference whose experts stay on the disk computes, to the bit, what one with all weights in memory does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.experts_on_disk import leave_experts_on_disk
from dense2moe.export.parity.forward import Reference, open_reference
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.subject import ParitySubject
from tests.test_calibration import CASES, draw_blocks, make_mixture
from tests.test_rounding import make_package, plant

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of width 0

MakeDense = Callable[..., Path]


@pytest.fixture
def left_on_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say from how many bytes on experts stay on the disk."""
    return lambda least: monkeypatch.setattr("dense2moe.export.parity.experts_on_disk.LEFT_ON_DISK_BYTES", least)


def memory_of_experts(reference: Reference) -> list[int]:
    """The addresses of the experts' first matrices, by layer."""
    return [next(block.experts.parameters()).data_ptr() for block in reference.modules.values()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_forward_is_the_same_to_the_bit(
    name: str, dtype: torch.dtype, make_dense: MakeDense, tmp_path: Path, left_on_disk: Callable[[int], None]
) -> None:
    architecture, overrides, settings = CASES[name]
    dense = make_dense(torch.bfloat16, architecture=architecture, **overrides)
    mixture, ids = make_mixture(dense, tmp_path / "mixture", settings), draw_blocks(3)
    forwards: dict[int, list[Any]] = {}
    for least in (1 << 40, 1):
        left_on_disk(least)
        with open_reference(mixture, dtype) as reference:
            mask = torch.ones_like(ids)
            forwards[least] = [reference.forward(ids, mask), reference.forward(ids[:1], mask[:1])]
            # a layer by itself, in between, reads its own experts and no others
            first = next(iter(reference.modules.values()))
            x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
            with torch.inference_mode():
                forwards[least].append(first(x))
            forwards[least].append(reference.forward(ids, mask))
            addresses = memory_of_experts(reference)
            assert len(set(addresses)) == (1 if least == 1 else len(addresses))
    for kept, left in zip(forwards[1 << 40], forwards[1], strict=True):
        if isinstance(kept, torch.Tensor | tuple):
            assert torch.equal(*(each[0] if isinstance(each, tuple) else each for each in (kept, left)))
            continue
        assert torch.equal(kept.logits, left.logits)
        assert all(torch.equal(a, b) for a, b in zip(kept.hiddens, left.hiddens, strict=True))


def test_small_experts_stay_in_memory(mixture_checkpoint: Path) -> None:
    with open_reference(mixture_checkpoint) as reference:
        assert len(set(memory_of_experts(reference))) == 2


def test_experts_that_the_checkpoint_stores_as_they_are_stay_in_memory(
    mixture_checkpoint: Path, left_on_disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_on_disk(1)
    with open_reference(mixture_checkpoint) as reference:
        before = memory_of_experts(reference)
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert name in dict(reference.model.named_parameters())
        checkpoint = type("Stored", (), {"entries": {name: None}})()
        monkeypatch.setattr("dense2moe.export.parity.experts_on_disk.open_checkpoint", lambda _: checkpoint)
        leave_experts_on_disk(reference.model, mixture_checkpoint)
        assert memory_of_experts(reference) == before


@pytest.mark.parametrize("is_planted", [False, True])
def test_parity_says_the_same_of_a_package(
    is_planted: bool, mixture_checkpoint: Path, tmp_path: Path, left_on_disk: Callable[[int], None]
) -> None:
    mixture, blocks = plant(mixture_checkpoint, tmp_path / "mixture"), draw_blocks(8, seed=1)
    twin, package = make_package(mixture, tmp_path, input_scaling="none")
    if is_planted:
        data = package / "model.onnx_data"
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 0x55
        data.write_bytes(content)
    said = {}
    for least in (1 << 40, 1):
        left_on_disk(least)
        subject = ParitySubject(package, twin, mixture, blocks, "int8", True)
        found = check_parity(subject, ParityConfig(), lambda *_: None)
        result = found.providers["CPUExecutionProvider"]
        assert not isinstance(result, str)
        said[least] = (found.breaches, result.twin, result.finetuned, result.places)
    assert said[1] == said[1 << 40]
    assert bool(said[1][0]) == is_planted
