"""Every planted fault is caught, by the tier that says most exactly where it is; docs/parity.md has the table."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import MixtralConfig, MixtralForCausalLM

from export.config import OnnxConfig, ParityConfig, QuantizeConfig, Variant
from export.package import write_package
from export.parity import Parity, ProviderParity, check_parity
from export.quantizer import quantize_checkpoint
from export.runtime import CPU
from export.storage import DATA_NAME, MODEL_NAME

DOCS = Path(__file__).parent.parent / "docs" / "parity.md"
BLOCKS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
WINDOW = 20
LAYER = 1  # of three


class Exported(NamedTuple):
    """A mixture whose experts differ, its twin, and its package."""

    source: Path
    twin: Path
    package: Path


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Exported]:
    """In float32 by the MoE operator, in int8 grouped and with exact activations. Shared: read only."""
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=128, sliding_window=WINDOW, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
    source = tmp_path_factory.mktemp("mixture")
    model.save_pretrained(source)
    made: dict[Variant, Exported] = {}
    for variant, lowering in (("float32", "fused"), ("int8", "grouped")):
        folder = tmp_path_factory.mktemp(variant)
        exported = Exported(source, folder / "twin", folder / "package")
        exported.twin.mkdir()
        exported.package.mkdir()
        quantize_checkpoint(source, exported.twin, variant, QuantizeConfig(method="round", block_size=16), silent)
        write_package(exported.twin, exported.package, OnnxConfig(lowering=lowering, activation_bits=32), silent)
        made[variant] = exported
    return made


class Graph:
    """A package's graph, with its weights as arrays."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.tensors = {tensor.name: tensor for tensor in proto.graph.initializer}

    def read(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.tensors[name])

    def write(self, name: str, value: np.ndarray) -> None:
        assert value.shape == self.read(name).shape
        assert not np.array_equal(value, self.read(name))
        self.tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, self.read(name).dtype), name))

    def node(self, output: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if output in node.output)

    def instead(self, value: str, nodes: list[onnx.NodeProto]) -> None:
        """Whoever reads `value` from now on reads what the last of the nodes, which read it, gives."""
        for node in self.graph.node:
            node.input[:] = [nodes[-1].output[0] if name == value else name for name in node.input]
        places = [n for n, node in enumerate(self.graph.node) if value in node.output]
        for offset, node in enumerate(nodes):
            self.graph.node.insert((places[0] + 1 if places else 0) + offset, node)

    def constant(self, name: str, *values: int) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name


def swap_two_experts(g: Graph) -> None:
    for matrix in ("fc1", "fc2"):
        name = f"layers.{LAYER}.moe.{matrix}"
        g.write(name, g.read(name)[[1, 0, 2, 3]])


def swap_gate_and_up(g: Graph) -> None:
    name = f"layers.{LAYER}.moe.fc1"
    rows = g.read(name)  # gate and up take turns
    g.write(name, np.stack([rows[:, 1::2], rows[:, 0::2]], axis=2).reshape(rows.shape))


def leave_weights_unnormalized(g: Graph) -> None:
    node = g.node(f"layers.{LAYER}.moe.output")
    next(attribute for attribute in node.attribute if attribute.name == "normalize_routing_weights").i = 0


def scale_one_expert_by_2_percent(g: Graph) -> None:
    name = f"layers.{LAYER}.moe.expert.2.down.scales"
    g.write(name, (g.read(name) * np.float32(1.02)).astype(g.read(name).dtype))


def quantize_the_router(g: Graph) -> None:
    name = f"router_logits.{LAYER}.weight"
    weight = g.read(name)  # [H, E]
    scale = np.abs(weight).max(axis=0) / 127
    g.write(name, np.round(weight / scale) * scale)


def take_another_rope_theta(g: Graph) -> None:
    cos = g.read("cos")
    frequencies = 1000.0 ** (-np.arange(cos.shape[1]) / cos.shape[1])  # the model's is 10000
    angles = np.arange(len(cos))[:, None] * frequencies
    g.write("cos", np.cos(angles))
    g.write("sin", np.sin(angles))


def drop_the_window(g: Graph) -> None:
    g.write(f"window_{WINDOW}", np.array(10**6, np.int64))


def shift_the_cache_by_one(g: Graph) -> None:
    """Where something is cached, rows are said to be one token shorter, so a new key takes the last one's place."""
    one = g.constant("fault.one", 1)
    g.instead("last_slot", [
        helper.make_node("Min", ["begin", one], ["fault.shift"]),
        helper.make_node("Sub", ["last_slot", "fault.shift"], ["fault.shifted"]),
    ])  # fmt: skip
    begin = g.node("begin")
    g.graph.node.remove(begin)
    g.graph.node.insert([n.output[0] for n in g.graph.node].index("length") + 1, begin)


def take_the_wrong_pad_side(g: Graph) -> None:
    """The mask is read from its end, as if padding were at the right; its shape is what it was."""
    ends = [g.constant("fault.start", -1), g.constant("fault.end", -(10**9)), g.constant("fault.axis", 1), g.constant("fault.step", -1)]
    g.instead("attention_mask", [helper.make_node("Slice", ["attention_mask", *ends], ["fault.reversed"])])


@dataclass(frozen=True)
class Row:
    """One row of the table; of the message, numbers that rounding may change are dots."""

    fault: str
    tier: str
    message: str


@dataclass(frozen=True)
class Planted:
    """A fault, the variant that it is planted in, and the tiers that stay right, so that the fault is where they do not look."""

    words: str
    fault: Callable[[Graph], None]
    right: tuple[str, ...] = ()
    variant: Variant = "float32"


PLANTED = (
    Planted("two experts swapped", swap_two_experts),
    Planted("gate and up swapped", swap_gate_and_up),
    Planted("top-k weights not renormalized", leave_weights_unnormalized),
    Planted("one expert's scale wrong by 2 %", scale_one_expert_by_2_percent, variant="int8"),
    Planted("router quantized to 8 bits", quantize_the_router),
    Planted("rope theta wrong", take_another_rope_theta, ("operator",)),
    Planted("window dropped", drop_the_window, ("operator",)),
    Planted("KV cache off by one", shift_the_cache_by_one, ("operator", "layer", "language", "routing")),
    Planted("wrong pad side", take_the_wrong_pad_side, ("operator", "layer", "language", "routing")),
)


def judge(exported: Exported, variant: Variant) -> tuple[Parity, ProviderParity]:
    config = ParityConfig(max_perplexity_increase={}, free_tokens=8)  # random weights: what quantizing costs is not asked here
    parity = check_parity(exported.package, exported.twin, exported.source, BLOCKS, variant, False, config, silent)
    result = parity.providers[CPU]
    assert isinstance(result, ProviderParity)
    return parity, result


def plant(exported: Exported, directory: Path, fault: Callable[[Graph], None]) -> Exported:
    package = directory / "faulty"
    shutil.copytree(exported.package, package)
    proto = onnx.load(package / MODEL_NAME)
    fault(Graph(proto))
    (package / DATA_NAME).unlink()
    onnx.save(proto, package / MODEL_NAME)
    return exported._replace(package=package)


def observe(planted: Planted, parity: Parity) -> Row:
    """The row of the table that a verdict gives: its first breach."""
    provider, tier, message = parity.breaches[0].split(": ", 2)
    assert provider == CPU
    return Row(planted.words, tier, re.sub(r"\d\.\d+(e[-+]\d\d)?", "…", message))


def read_table() -> list[Row]:
    lines = DOCS.read_text(encoding="utf-8").partition("| fault | tier | message |\n")[2].splitlines()
    return [Row(*(cell.strip().strip("`") for cell in line.strip("|").split(" | "))) for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_the_package_without_a_fault_passes_every_tier(exports: dict[Variant, Exported], variant: Variant) -> None:
    parity, result = judge(exports[variant], variant)
    assert parity.breaches == ()
    passed = dict.fromkeys(("operator", "layer", "logits", "language", "routing"), "passed")
    assert result.tiers == {**passed, "task": "not run: no task was given"}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault.__name__)
def test_a_planted_fault_is_caught_and_named_as_the_table_says(exports: dict[Variant, Exported], tmp_path: Path, planted: Planted) -> None:
    parity, result = judge(plant(exports[planted.variant], tmp_path, planted.fault), planted.variant)
    assert not parity.passed
    row = observe(planted, parity)
    assert row in read_table()
    assert result.tiers[row.tier] == "broken"  # type: ignore[index]
    assert {result.tiers[tier] for tier in planted.right} <= {"passed"}  # type: ignore[index]


def test_the_table_has_every_fault_once() -> None:
    assert [row.fault for row in read_table()] == [planted.words for planted in PLANTED]


def load_benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(5))
def test_a_right_export_raises_no_alarm_and_keeps_its_distance(tmp_path: Path, seed: int) -> None:
    """Five of the benchmark's fifty seeds; each is another shape and lowering."""
    benchmark = load_benchmark()
    result, breaches = benchmark.judge(seed, tmp_path)
    assert breaches == ()
    ratios = benchmark.find_ratios(result)
    assert max(ratios.values()) < ParityConfig().noise_multiple / 2  # 6.2 over fifty seeds
    assert min(ratios["logits"], ratios["hidden"], ratios["experts"]) > 0.1  # a noise that is far too large would hide faults
