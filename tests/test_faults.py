"""Every planted fault is caught and its place named, by the first line that parity says.

Docs/parity.md has the table.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, get_args

import pytest
import torch
from shapes import each_shape

from dense2moe.export.graph.config import OnnxConfig
from dense2moe.export.package import write_package
from dense2moe.export.parity.config import ParityConfig
from dense2moe.export.parity.inside.meter import LEAST_NOISE
from dense2moe.export.parity.judgement import check_parity
from dense2moe.export.parity.place import PlacePart
from dense2moe.export.parity.records import TIERS, Parity, ProviderParity
from dense2moe.export.parity.subject import ParitySubject
from dense2moe.export.quantization.config import QuantizeConfig
from dense2moe.export.quantization.quantizer import quantize_checkpoint
from dense2moe.export.runtime.decoder import CPU
from dense2moe.export.variant import Variant
from tests.faults.planted import FAULTS, WAYS, Exported, Fault, plant

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
from tests.foreign import make_checkpoint

DOCS = Path(__file__).parent.parent / "docs" / "parity.md"
BLOCKS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
# Random weights: what quantizing costs is not asked here. No more text than the faults need: there are many of them.
CONFIG = ParityConfig(max_perplexity_increase={}, free_tokens=4, decode_steps=8, longest_row=48, noise_blocks=1)
PLANTED_IN: tuple[Variant, ...] = ("float32", "int8")
PLANTS = [(variant, fault) for variant in PLANTED_IN for fault in FAULTS.values()]
# What is wrong in a place is found from the graph's own input in the same way whatever the variant, so each such fault
# is in one of them; what is wrong in a way of feeding is told against the twin in one and against itself in the other.
SHAPES = {
    f"{variant}-{fault.words}"
    for number, fault in enumerate(FAULTS.values())
    for variant in (PLANTED_IN if fault.shows != WAYS else PLANTED_IN[number % 2 :][:1])
}
SEEDS = {"1", "2", "3"}
"""One for each lowering, of either width, and with a window and without."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Exported]:
    """A mixture in float32 by the MoE operator, and in int8 grouped, with activations in 8 bits. Shared: read only."""
    source = make_checkpoint("mixtral", tmp_path_factory.mktemp("mixture"))
    made: dict[Variant, Exported] = {}
    for variant in PLANTED_IN:
        folder = tmp_path_factory.mktemp(variant)
        exported = Exported(source, folder / "twin", folder / "package")
        exported.twin.mkdir()
        exported.package.mkdir()
        quantize_checkpoint(source, exported.twin, variant, QuantizeConfig(method="round", block_size=16), silent)
        config = (
            OnnxConfig(lowering="fused", activation_bits=32)
            if variant == "float32"
            else OnnxConfig(lowering="grouped", activation_bits=8)
        )
        write_package(exported.twin, exported.package, config, silent)
        made[variant] = exported
    return made


class Row(NamedTuple):
    """One row of the table; of the message, numbers that rounding or the variant may change are dots."""

    fault: str
    tier: str
    message: str


def judge(exported: Exported, variant: Variant) -> tuple[Parity, ProviderParity]:
    """Beside the twin alone: a fine-tuned model would only say what quantizing costs."""
    parity = check_parity(
        ParitySubject(exported.package, exported.twin, exported.twin, BLOCKS, variant, variant == "int8"),
        CONFIG,
        silent,
    )
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    return parity, result


def observe(fault: Fault, parity: Parity) -> Row:
    """The row of the table that a verdict gives: its first breach."""
    provider, tier, message = parity.breaches[0].split(": ", 2)
    assert provider == CPU
    return Row(fault.words, tier, re.sub(r"\d\.\d+(e[-+]\d\d)?", "…", message))


def read_table() -> list[Row]:
    lines = DOCS.read_text(encoding="utf-8").partition("| fault | tier | message |\n")[2].splitlines()
    return [
        Row(*(cell.strip().strip("`") for cell in line.strip("|").split(" | ")))
        for line in lines[1:]
        if line.startswith("| ")
    ]


@pytest.mark.parametrize("variant", PLANTED_IN)
def test_the_package_without_a_fault_passes_every_tier(exports: dict[Variant, Exported], variant: Variant) -> None:
    parity, result = judge(exports[variant], variant)
    assert parity.breaches == ()
    assert result.tiers == {**dict.fromkeys(TIERS, "passed"), "task": "not run: no task was given"}


@pytest.mark.parametrize(
    ("variant", "fault"), each_shape(PLANTS, SHAPES, name=lambda plant: f"{plant[0]}-{plant[1].words}")
)
def test_a_planted_fault_is_named_first_as_the_table_says(
    exports: dict[Variant, Exported], tmp_path: Path, variant: Variant, fault: Fault
) -> None:
    parity, result = judge(plant(exports[variant], tmp_path, fault, BLOCKS), variant)
    assert not parity.passed
    assert fault.is_named(parity.breaches[0])
    row = observe(fault, parity)
    assert row in read_table()
    assert result.tiers[row.tier] == "broken"  # type: ignore[index]
    if fault.shows != WAYS:  # it is in a way of feeding alone, and the text itself is read rightly
        assert {tier for tier, told in result.tiers.items() if told == "broken"} == {"logits"}


def test_the_table_has_every_fault_once() -> None:
    assert [row.fault for row in read_table()] == list(FAULTS)


def load_benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", each_shape(range(5), SEEDS))
def test_a_right_export_raises_no_alarm_and_keeps_its_distance(tmp_path: Path, seed: int) -> None:
    """Five of the benchmark's fifty seeds; each is another shape and lowering."""
    benchmark = load_benchmark()
    result, breaches = benchmark.judge(seed, tmp_path)
    assert breaches == ()
    ratios = benchmark.find_ratios(result)
    assert set(ratios) <= {"logits", *get_args(PlacePart)}
    assert max(ratios.values()) < ParityConfig().noise_multiple / 2
    assert min(ratios["logits"], ratios["experts"]) > 0.1  # a noise that is far too large would hide faults
    assert all(place.noise is None or place.noise < 20 * LEAST_NOISE for place in result.places)
